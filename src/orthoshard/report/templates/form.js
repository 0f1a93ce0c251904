// The calculator's form: what is chosen, the rows that follow from it, and a picture of where a step's time goes.

const CalculatorForm = (form, { constants, models, machines, alone, replicas }) => {
  const calculator = Calculator(constants);
  const field = (name) => form.elements[name];
  const part = (name) => document.querySelector(`[data-calculator="${name}"]`);
  const AXES = ["dp", "fsdp", "tp"];

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
    value >= 10 ** (digits - 1) ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(digits)));
  const large = (value) => (value >= 1e9 ? `${(value / 1e9).toPrecision(4)} B` : `${(value / 1e6).toPrecision(4)} M`);
  const percent = (value) => `${grouped(value * 100)} %`;
  // What a column shows: its value, and how it reads.
  const COLUMNS = [
    [(found) => found.times.optimizer, seconds],
    [(found) => found.times.overhead, percent],
    [(found) => found.days, (value) => grouped(value, 4)],
    [(found) => found.cost, grouped],
    [(found) => found.amounts.state, bytes],
    [(found) => found.amounts.temporaries, bytes],
    [(found) => found.times.products, seconds],
    [(found) => found.times.passes, seconds],
    [(found) => found.times.intra, seconds],
    [(found) => found.times.inter, seconds],
    [(found) => found.times.sync, seconds],
  ];

  const chosen = () => {
    const model = models[field("model").value], machine = machines[field("machine").value];
    const mesh = Object.fromEntries(AXES.map((name) => [name, 2 ** Number(field(name).value)]));
    const ranks = AXES.reduce((product, name) => product * mesh[name], 1);
    const job = {
      active: model.active,
      ranks,
      tokens_per_step: Number(field("tokens_per_step").value) * 1e6,
      tokens: Number(field("tokens").value) * 1e9,
      utilization: Number(field("utilization").value) / 100,
      price: Number(field("price").value),
    };
    return { model, machine, mesh, job, rank: 1 / 2 ** Number(field("rank").value) };
  };

  const warnings = ({ model, mesh, machine, job }) => {
    const found = [];
    if (![job.tokens_per_step, job.tokens, job.utilization].every((value) => value > 0) || job.utilization > 1 || !(job.price >= 0))
      return ["Tokens have to be above 0, utilization between 0 and 100 %, the price not below 0."];
    if (mesh.tp > 1 && !model.tp) found.push(`${model.name} does not say how tensor parallelism would cut it: tp leaves its matrices whole here.`);
    const uneven = model.model.kinds.filter((kind) => {
      const rows = (kind.tp === "rows" ? mesh.tp : 1) * (kind.fsdp === "rows" ? mesh.fsdp : 1);
      const columns = (kind.tp === "columns" ? mesh.tp : 1) * (kind.fsdp === "columns" ? mesh.fsdp : 1);
      return kind.m % rows || kind.n % columns || (kind.fsdp === "stack" && kind.count % mesh.fsdp);
    });
    if (uneven.length) found.push("This mesh does not cut every matrix evenly: the figures are those of an even cut.");
    if (mesh.tp > machine.per_node) found.push(`tp = ${mesh.tp} reaches beyond a node of ${machine.per_node}.`);
    return found;
  };

  // What is added to a step, in its two parts; a bar that is more than CUT times as long as the middle one is broken off.
  const CUT = 3;
  const bars = (made) => {
    const SVG = "http://www.w3.org/2000/svg", box = part("bars");
    const width = Math.max(260, box.clientWidth), row = 36;
    const added = made.map(({ found }) => found.times.sync + found.times.optimizer).sort((a, b) => a - b);
    const most = Math.min(added[added.length - 1], CUT * added[Math.floor(added.length / 2)]);
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${made.length * row}`);
    svg.setAttribute("height", made.length * row);
    svg.setAttribute("aria-hidden", "true");
    const add = (name, attributes, text = "") => {
      const element = document.createElementNS(SVG, name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      element.textContent = text;
      svg.append(element);
    };
    made.forEach(({ name, found }, i) => {
      const { sync, optimizer, overhead } = found.times, top = i * row + 17;
      const broken = sync + optimizer > most * 1.0001;
      const note = broken ? " (broken off)" : "";
      add("text", { x: 0, y: top - 5 }, `${name}: ${seconds(sync + optimizer)}, ${percent(overhead)}${note}`);
      let at = 0;
      for (const [size, look] of [[sync, "sync"], [optimizer, "optimizer"]]) {
        const end = Math.min(width, at + (size / most) * width);
        add("rect", { class: look, x: at, y: top, width: end - at, height: 12 });
        at = end;
      }
      if (broken) add("path", { class: "broken", d: `M${width - 14},${top - 2}l-5,8h6l-5,8` });
    });
    box.replaceChildren(svg);
  };

  const update = () => {
    for (const name of AXES) {
      const size = String(2 ** Number(field(name).value));
      form.querySelector(`[data-shows="${name}"]`).textContent = size;
      field(name).setAttribute("aria-valuetext", size);
    }
    const denominator = 2 ** Number(field("rank").value), rankText = denominator === 1 ? "1 (full)" : `1/${denominator}`;
    form.querySelector('[data-shows="rank"]').textContent = rankText;
    field("rank").setAttribute("aria-valuetext", rankText);
    const choice = chosen(), { model, machine, mesh, job, rank } = choice;
    const active = model.active < model.parameters ? `, a token meets ${large(model.active)}` : "";
    part("about-model").textContent = `${large(model.parameters)} parameters${active}; ${model.source}.`;
    part("about-machine").textContent = `${machine.about}.`;
    part("assumptions").replaceChildren(...machine.words.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
    const wrong = warnings(choice);
    part("warning").textContent = wrong.join(" ");
    const made = (mesh.dp > 1 ? replicas : alone).map(({ label, implemented, ...row }) => {
      const rows = { ...row, rank: label.includes("{rank}") ? rank : 1 };
      const found = calculator.plan(model.model, mesh, rows, machine, job);
      const name = label.replace("{rank}", denominator === 1 ? "1" : `1/${denominator}`);
      return { name: name + (implemented ? "" : " †") + (found.fits ? "" : " ‡"), usable: implemented && found.fits, found };
    });
    const body = part("rows").tBodies[0];
    body.replaceChildren(
      ...made.map(({ name, found }) => {
        const row = document.createElement("tr"), heading = document.createElement("th");
        Object.assign(heading, { scope: "row", className: "words", textContent: name });
        row.append(heading);
        for (const [value, form] of COLUMNS) {
          const number = value(found), cell = row.insertCell();
          cell.dataset.value = number;
          cell.textContent = Number.isFinite(number) ? form(number) : "–";
        }
        return row;
      }),
    );
    const usable = made.filter((one) => one.usable);
    const least = usable.reduce((a, b) => (b.found.times.overhead < a.found.times.overhead ? b : a), usable[0]);
    part("verdict").textContent =
      `${grouped(job.ranks)} ranks; forward and backward take ${seconds(made[0].found.times.model)} a step, ` +
      `${grouped(job.tokens / job.tokens_per_step)} steps. ` +
      (least ? `Least is added by ${least.name}: ${percent(least.found.times.overhead)}.` : "Nothing fits into memory.");
    bars(made);
  };

  form.querySelectorAll("[data-moves]").forEach(couple);
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  let width = 0;
  new ResizeObserver(() => {
    if (part("bars").clientWidth !== width) (width = part("bars").clientWidth), update();
  }).observe(part("bars"));
  update();
};
