"""The calculator's JavaScript in an engine without a page."""

from __future__ import annotations

import json

import quickjs

from orthoshard.report import calculator
from orthoshard.report.page import asset


class Engine:
    """``plan(model, mesh, row, machine, job)`` as the page computes it: amounts, times, days, cost."""

    def __init__(self) -> None:
        context = quickjs.Context()
        constants = json.dumps(calculator.constants())
        context.eval(asset("calculator.js") + f"\nconst page = Calculator({constants});")
        context.eval("globalThis.run = (text) => JSON.stringify(page.plan(...JSON.parse(text)));")
        self._run = context.get("run")

    def plan(self, *arguments):
        return json.loads(self._run(json.dumps(arguments)))
