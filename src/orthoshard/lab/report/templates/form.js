// The calculator's form: what is chosen, what a run comes to with each optimizer, and a picture of where a step's time
// goes. What a step takes is data of the page, from the step run dry.

const CalculatorForm = (form, { cases, machines }) => {
  const field = (name) => form.elements[name];
  const part = (name) => document.querySelector(`[data-calculator="${name}"]`);
  const DAY = 86400;

  // A slider beside a number moves it on a logarithmic or linear scale; the number is what counts.
  const couple = (slider) => {
    const number = field(slider.dataset.moves), log = "log" in slider.dataset;
    const low = Number(slider.dataset.low), high = Number(slider.dataset.high);
    const text = (value) => Number(value.toPrecision(2));
    const follow = () => {
      const value = Math.min(high, Math.max(low, Number(number.value)));
      slider.value = 1000 * (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));
      slider.setAttribute("aria-valuetext", number.value);
    };
    slider.addEventListener("input", () => {
      const share = slider.value / 1000;
      number.value = text(log ? low * (high / low) ** share : low + (high - low) * share);
      slider.setAttribute("aria-valuetext", number.value);
      update();
    });
    number.addEventListener("input", follow);
    follow();
  };

  const seconds = (value) => {
    if (value === 0) return "0";
    if (value >= 1) return `${value >= 100 ? value.toFixed(0) : value.toPrecision(3)} s`;
    if (value >= 1e-3) return `${(value * 1e3).toPrecision(3)} ms`;
    return `${(value * 1e6).toPrecision(3)} µs`;
  };
  const bytes = (value) => {
    for (const [unit, factor] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
      if (value >= factor) return `${(value / factor).toPrecision(3)} ${unit}`;
    return `${value.toFixed(0)} B`;
  };
  const grouped = (value, digits = 3) =>
    Math.abs(value) >= 10 ** (digits - 1) ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(digits)));
  const large = (value) => (value >= 1e9 ? `${(value / 1e9).toPrecision(4)} B` : `${(value / 1e6).toPrecision(4)} M`);
  const percent = (value) => `${grouped(value * 100)} %`;
  // What a column shows: its value, and how it reads.
  const COLUMNS = [
    [(found) => found.optimizer, seconds],
    [(found) => found.overhead, percent],
    [(found) => found.days, (value) => grouped(value, 4)],
    [(found) => found.cost, grouped],
    [(found) => found.less, grouped],
    [(found) => found.state, bytes],
    [(found) => found.temporaries, bytes],
    [(found) => found.seconds.products, seconds],
    [(found) => found.seconds.passes, seconds],
    [(found) => found.seconds.intra, seconds],
    [(found) => found.seconds.inter, seconds],
    [(found) => found.seconds.sync, seconds],
  ];

  const chosen = () => {
    const number = Object.fromEntries([...form.querySelectorAll("input[type=number]")].map((one) => [one.name, Number(one.value)]));
    const machine = Number(field("machine").value), plan = cases[field("case").value];
    const model = (plan.per_token[machine] * number.tokens_per_step * 1e6) / (number.utilization / 100);
    return { plan, machine, model, fraction: field("fraction").value, ...number };
  };

  const warnings = ({ plan, tokens_per_step, utilization, days, count, price, saving, share }) => {
    if (![tokens_per_step, utilization, days, count].every((value) => value > 0) || utilization > 100 || !(price >= 0))
      return "Tokens, days and count have to be above 0, utilization between 0 and 100 %, the price not below 0.";
    if (!(saving < 100 && share >= 0 && share < 100)) return "Steps saved have to be below 100 %, a share between 0 and 100 %.";
    return count === plan.ranks ? "" : `Seconds are those of ${grouped(plan.ranks)} ranks: the count is in the cost alone.`;
  };

  // Days of forward and backward, and what a step has more; AdamW takes all steps, the others may save some.
  const run = (choice, row) => {
    const spent = row.seconds[choice.machine], optimizer = spent.products + spent.passes + spent.intra + spent.inter;
    const overhead = (optimizer + spent.sync) / choice.model;
    const days = choice.days * (1 + overhead) * (row.baseline ? 1 : 1 - choice.saving / 100);
    const fits = row.memory <= machines[choice.machine].capacity;
    return { ...row, seconds: spent, optimizer, overhead, days, cost: days * 24 * choice.count * choice.price, fits };
  };

  // An optimizer of which nothing is known but the share of a step that it takes.
  const own = (choice) => {
    const added = (choice.model * choice.share) / (100 - choice.share);
    const spent = { products: added, passes: 0, intra: 0, inter: 0, sync: 0 };
    const row = { name: `any that takes ${choice.share} % of a step`, memory: 0, state: NaN, temporaries: NaN };
    return run(choice, { ...row, seconds: { [choice.machine]: spent } });
  };

  // What is added to a step, in its two parts; a bar that is more than CUT times as long as the middle one is cut off.
  const CUT = 3;
  const bars = (made) => {
    const added = made.map((found) => found.seconds.sync + found.optimizer).sort((a, b) => a - b);
    const most = Math.min(added[added.length - 1], CUT * added[Math.floor(added.length / 2)]);
    const div = (...inside) => {
      const element = document.createElement("div");
      element.append(...inside);
      return element;
    };
    const rows = made.map(({ name, optimizer, overhead, seconds: { sync } }) => {
      const note = sync + optimizer > most * 1.0001 ? " (cut off)" : "";
      const bar = div();
      bar.className = "bar";
      for (const [size, look] of [[sync, "sync"], [optimizer, "optimizer"]]) {
        const part = document.createElement("i");
        part.className = look;
        part.style.width = `${(100 * size) / most}%`;
        bar.append(part);
      }
      return div(`${name}: ${seconds(sync + optimizer)}, ${percent(overhead)}${note}`, bar);
    });
    part("bars").replaceChildren(...rows);
  };

  // Ranks that the plan has, of which rows are shown.
  const fractions = () => {
    const found = [...new Set(cases[field("case").value].rows.map((row) => row.fraction).filter(Boolean))];
    const before = field("fraction").value || form.dataset.fraction;
    field("fraction").replaceChildren(...found.map((text) => new Option(text, text, false, text === before)));
  };

  const update = () => {
    const choice = chosen(), { plan, model, fraction } = choice, machine = machines[choice.machine];
    const active = plan.active < plan.parameters ? `, ${large(plan.active)} active per token` : "";
    part("about-model").textContent = `${large(plan.parameters)} parameters${active}; ${plan.source}.`;
    part("about-machine").textContent = `${machine.about}.`;
    part("assumptions").replaceChildren(...machine.words.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
    part("warning").textContent = warnings(choice);
    const rows = plan.rows.filter((row) => !row.fraction || row.fraction === fraction);
    const made = [...rows.map((row) => run(choice, row)), own(choice)];
    const adamw = made.find((found) => found.baseline);
    for (const found of made) {
      found.less = adamw ? adamw.cost - found.cost : NaN;
      found.name += found.fits ? "" : " ‡";
    }
    const body = part("rows").tBodies[0];
    body.replaceChildren(
      ...made.map((found) => {
        const row = document.createElement("tr"), heading = document.createElement("th");
        Object.assign(heading, { scope: "row", className: "words", textContent: found.name });
        row.append(heading);
        for (const [value, form] of COLUMNS) {
          const number = value(found), cell = row.insertCell();
          cell.dataset.value = number;
          cell.textContent = Number.isFinite(number) ? form(number) : "–";
        }
        return row;
      }),
    );
    const usable = made.slice(0, -1).filter((found) => found.fits);
    const least = usable.reduce((a, b) => (b.days < a.days ? b : a), usable[0]);
    part("verdict").textContent =
      `Forward and backward take ${seconds(model)} a step, ${grouped((choice.days * DAY) / model)} steps. ` +
      (least ? `Fewest days with ${least.name}: ${grouped(least.days, 4)}.` : "Nothing fits into memory.");
    bars(made);
  };

  field("case").addEventListener("input", () => {
    field("count").value = cases[field("case").value].ranks;
    field("count").dispatchEvent(new Event("input"));
    fractions();
  });
  fractions();
  form.querySelectorAll("[data-moves]").forEach(couple);
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
};
