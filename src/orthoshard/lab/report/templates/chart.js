// Curves as SVG at the size of their place: a choice of both axes, curves that are switched on and off, and a position
// that is moved by pointer, finger or keyboard (it is an ordinary slider) and read out in the legend.

const Chart = (figure, spec) => {
  const SVG = "http://www.w3.org/2000/svg";
  const DASHES = ["", "7 3", "2 3", "9 3 2 3"], SHAPES = ["circle", "square", "triangle", "diamond", "cross"];
  const find = (selector) => figure.querySelector(selector);
  const plot = find(".plot"), slider = find(".position"), shown = find(".at"), legend = find(".legend ul");
  const choice = { x: find(".choose-x"), value: find(".choose-value"), scale: find(".choose-scale"), late: find(".late") };
  const margin = { left: 52, right: 14, top: 10, bottom: 40 };
  let view = null;

  const make = (name, attributes = {}, text = "") => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text) element.textContent = text;
    return element;
  };
  const look = (k) => ({ color: `var(--c${k % 8})`, dash: DASHES[(k + Math.floor(k / 8)) % 4], shape: SHAPES[k % 5] });
  const mark = (shape, x, y, color, r = 3.5) => {
    const fill = { fill: color, stroke: color };
    if (shape === "circle") return make("circle", { cx: x, cy: y, r, ...fill });
    if (shape === "square") return make("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r, ...fill });
    const paths = {
      triangle: `M${x},${y - r * 1.2}l${r * 1.2},${r * 2.1}h${-r * 2.4}z`,
      diamond: `M${x},${y - r * 1.3}l${r * 1.3},${r * 1.3}l${-r * 1.3},${r * 1.3}l${-r * 1.3},${-r * 1.3}z`,
      cross: `M${x - r},${y - r}l${2 * r},${2 * r}m0,${-2 * r}l${-2 * r},${2 * r}`,
    };
    return make("path", { d: paths[shape], ...fill, "stroke-width": shape === "cross" ? 2 : 1 });
  };

  const short = (value) => {
    const size = Math.abs(value);
    for (const [unit, factor] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["K", 1e3]])
      if (size >= factor) return `${Number((value / factor).toPrecision(3))}${unit}`;
    return size && size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(4)));
  };
  const ticks = (low, high, log, most) => {
    if (log) {
      const found = [];
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
        for (const step of [1, 2, 5]) found.push(step * 10 ** e);
      const inside = found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
      const tens = inside.filter((tick) => Math.abs(Math.log10(tick) % 1) < 1e-9);
      if (inside.length >= 3) return inside.length > most && tens.length > 1 ? tens : inside;
    }
    const rough = (high - low || 1) / most, ten = 10 ** Math.floor(Math.log10(rough));
    const step = ten * [1, 2, 5, 10].find((factor) => factor * ten >= rough * 0.999);
    const found = [];
    for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-6; tick += step) found.push(tick);
    return found;
  };

  // What is on the screen: the curves that are switched on, as points [x, y] of the chosen axes.
  const curves = () => {
    const axis = spec.axes.find((one) => one.key === choice.x.value), log = choice.scale.value === "log";
    const all = [];
    spec.series.forEach((series, k) => {
      const line = series.lines[choice.value.value];
      if (!line || !boxes[k].checked) return;
      const points = line.y.map((y, i) => [line.x[axis.key][i], y]);
      all.push({ k, dots: line.dots, points: points.filter(([x, y]) => (!axis.log || x > 0) && (!log || y > 0)) });
    });
    const end = Math.max(...all.flatMap((one) => one.points.map((point) => point[0])), -Infinity);
    if (choice.late.checked && spec.late)
      for (const one of all) one.points = one.points.filter(([x]) => x >= end / 10);
    return { axis, log, lines: all.filter((one) => one.points.length) };
  };

  const draw = () => {
    const { axis, log, lines } = curves();
    const width = Math.max(260, plot.clientWidth), height = Math.min(440, Math.max(260, width * 0.5));
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
    plot.replaceChildren(svg);
    view = null;
    if (!lines.length) {
      svg.setAttribute("aria-label", `${spec.title}: no curve is switched on`);
      svg.append(make("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no curve is switched on"));
      slider.disabled = true;
      return read();
    }
    const xs = lines.flatMap((line) => line.points.map((point) => point[0]));
    const ys = lines.flatMap((line) => line.points.map((point) => point[1]));
    const scale = (values, low, high, logarithmic, pad) => {
      const f = logarithmic ? Math.log : (value) => value;
      let least = f(values.reduce((a, b) => Math.min(a, b))), most = f(values.reduce((a, b) => Math.max(a, b)));
      const room = (most - least || Math.abs(most) || 1) * pad;
      if (most === least || pad) (least -= room), (most += room);
      const back = logarithmic ? Math.exp : (value) => value;
      const to = (value) => low + ((f(value) - least) / (most - least || 1)) * (high - low);
      return { to, from: (place) => back(least + ((place - low) / (high - low)) * (most - least)), low: back(least), high: back(most) };
    };
    const x = scale(xs, margin.left, width - margin.right, axis.log, 0);
    const y = scale(ys, height - margin.bottom, margin.top, log, 0.04);
    for (const tick of ticks(y.low, y.high, log, 6)) {
      svg.append(make("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y.to(tick), y2: y.to(tick) }));
      svg.append(make("text", { x: margin.left - 6, y: y.to(tick) + 4, "text-anchor": "end" }, short(tick)));
    }
    for (const tick of ticks(x.low, x.high, axis.log, Math.max(3, Math.floor(width / 110))))
      svg.append(make("text", { x: x.to(tick), y: height - margin.bottom + 18, "text-anchor": "middle" }, short(tick)));
    const middle = (margin.left + width - margin.right) / 2;
    svg.append(make("text", { class: "title", x: middle, y: height - 4, "text-anchor": "middle" }, axis.title));
    for (const line of lines) {
      const { color, dash, shape } = look(line.k);
      const path = line.points.map(([a, b], i) => `${i ? "L" : "M"}${x.to(a).toFixed(1)},${y.to(b).toFixed(1)}`).join("");
      if (!line.dots) svg.append(make("path", { d: path, fill: "none", stroke: color, "stroke-width": 2, "stroke-dasharray": dash }));
      const every = line.dots ? 1 : Math.ceil(line.points.length / 24);
      line.points.forEach(([a, b], i) => {
        if (line.points.length <= 60 ? i % every === 0 || i === line.points.length - 1 : i % every === 0)
          svg.append(mark(shape, x.to(a), y.to(b), color));
      });
    }
    svg.setAttribute("aria-label", `${spec.title}: ${choice.value.value}, ${spec.unit}, against ${axis.title}; ${lines.length} curves. The slider below reads them out.`);
    const places = [...new Set(xs)].sort((a, b) => a - b);
    const share = slider.max > 0 ? slider.value / slider.max : 1;
    slider.disabled = false;
    slider.max = places.length - 1;
    slider.value = Math.round(share * slider.max);
    const cursor = make("g");
    svg.append(cursor);
    view = { svg, axis, lines, x, y, places, cursor, height };
    read();
  };

  // The value of a curve at a position: its own point, or the straight line between two; none outside of it.
  const valueAt = (points, place, dots) => {
    const after = points.findIndex((point) => point[0] >= place);
    if (after < 0) return null;
    if (points[after][0] === place) return points[after][1];
    if (after === 0 || dots) return null;
    const [[x0, y0], [x1, y1]] = [points[after - 1], points[after]];
    return y0 + ((y1 - y0) * (place - x0)) / (x1 - x0);
  };

  const read = () => {
    values.forEach((output) => (output.textContent = ""));
    if (!view) return (shown.textContent = "–");
    const place = view.places[slider.value];
    view.cursor.replaceChildren(
      make("line", { class: "cursor", x1: view.x.to(place), x2: view.x.to(place), y1: margin.top, y2: view.height - margin.bottom }),
    );
    const said = [];
    for (const line of view.lines) {
      const value = valueAt(line.points, place, line.dots);
      if (value === null) continue;
      const text = Math.abs(value) >= 1e-3 ? value.toPrecision(4) : value.toExponential(2);
      values[line.k].textContent = text;
      said.push(`${spec.series[line.k].label} ${text}`);
      view.cursor.append(make("circle", { cx: view.x.to(place), cy: view.y.to(value), r: 5, fill: "none", stroke: look(line.k).color, "stroke-width": 2 }));
    }
    shown.textContent = `${short(place)} ${view.axis.key === "lr" || view.axis.key === "mbit" ? "" : view.axis.key}`.trim();
    slider.setAttribute("aria-valuetext", `${view.axis.title} ${short(place)}: ${said.join("; ")}`);
  };

  const follow = (event) => {
    if (!view) return;
    const box = view.svg.getBoundingClientRect();
    const at = view.x.from(((event.clientX - box.left) / box.width) * view.svg.viewBox.baseVal.width);
    let nearest = 0;
    view.places.forEach((place, i) => {
      if (Math.abs(place - at) < Math.abs(view.places[nearest] - at)) nearest = i;
    });
    slider.value = nearest;
    read();
  };

  const boxes = [], values = [];
  spec.series.forEach((series, k) => {
    const item = document.createElement("li"), label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: series.shown });
    const name = Object.assign(document.createElement("span"), { className: "name", textContent: series.label });
    const value = Object.assign(document.createElement("span"), { className: "value" });
    const swatch = make("svg", { class: "swatch", viewBox: "0 0 38 16", "aria-hidden": "true" });
    const { color, dash, shape } = look(k);
    const dots = Object.values(series.lines).every((line) => line.dots);
    if (!dots) swatch.append(make("path", { d: "M1,8H37", stroke: color, "stroke-width": 2, "stroke-dasharray": dash }));
    swatch.append(mark(shape, 19, 8, color, 4));
    label.append(box, swatch, name, value);
    item.append(label);
    legend.append(item);
    boxes.push(box);
    values.push(value);
    box.addEventListener("change", draw);
  });
  slider.addEventListener("input", read);
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  for (const control of Object.values(choice)) control.addEventListener("change", draw);
  let width = 0;
  new ResizeObserver(() => {
    if (plot.clientWidth !== width) (width = plot.clientWidth), draw();
  }).observe(plot);
};
