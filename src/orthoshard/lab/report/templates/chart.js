// Curves drawn by uPlot: a choice of both axes, curves that are switched on and off, and a position that is moved by
// pointer, finger or keyboard (it is an ordinary slider) and read out in the legend.

const Chart = (figure, spec) => {
  const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3]];
  const find = (selector) => figure.querySelector(selector);
  const place = find(".plot"), slider = find(".position"), shown = find(".at"), legend = find(".legend ul");
  const choice = { x: find(".choose-x"), value: find(".choose-value"), scale: find(".choose-scale"), late: find(".late") };
  const style = (name) => getComputedStyle(figure).getPropertyValue(name).trim();
  const dash = (k) => DASHES[(k + Math.floor(k / 8)) % 4];
  const boxes = [], values = [];
  let plot = null, view = null;

  const short = (value) => {
    const size = Math.abs(value);
    for (const [unit, factor] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["K", 1e3]])
      if (size >= factor) return `${Number((value / factor).toPrecision(3))}${unit}`;
    return size && size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(4)));
  };

  // What is on the screen: the curves that are switched on, as points [x, y] of the chosen axes.
  const curves = () => {
    const axis = spec.axes.find((one) => one.key === choice.x.value), log = choice.scale.value === "log";
    const all = [];
    spec.series.forEach((series, k) => {
      const line = series.lines[choice.value.value];
      if (!line || !boxes[k].checked) return;
      const points = line.y.map((y, i) => [line.x[axis.key][i], y]).sort((a, b) => a[0] - b[0]);
      all.push({ k, dots: line.dots, points: points.filter(([x, y]) => (!axis.log || x > 0) && (!log || y > 0)) });
    });
    const end = Math.max(...all.flatMap((one) => one.points.map((point) => point[0])), -Infinity);
    if (choice.late.checked && spec.late)
      for (const one of all) one.points = one.points.filter(([x]) => x >= end / 10);
    return { axis, log, lines: all.filter((one) => one.points.length) };
  };

  const draw = () => {
    const { axis, log, lines } = curves();
    if (plot) plot.destroy();
    plot = view = null;
    place.textContent = lines.length ? "" : "no curve is switched on";
    slider.disabled = !lines.length;
    if (!lines.length) return read();
    const data = uPlot.join(lines.map(({ points }) => [points.map((point) => point[0]), points.map((point) => point[1])]));
    const width = Math.max(260, place.clientWidth), ink = style("--quiet"), grid = { stroke: style("--line"), width: 1 };
    const scale = (logarithmic) => (logarithmic ? { distr: 3 } : {});
    const ticks = (_, splits) => splits.map((tick) => (tick === null ? "" : short(tick)));
    plot = new uPlot(
      {
        width,
        height: Math.min(440, Math.max(260, width * 0.5)),
        legend: { show: false },
        scales: { x: { time: false, ...scale(axis.log) }, y: scale(log) },
        axes: [
          { stroke: ink, grid: { show: false }, label: axis.title, values: ticks },
          { stroke: ink, grid, values: ticks, size: 60 },
        ],
        cursor: { drag: { x: false, y: false }, points: { size: 9 } },
        series: [
          {},
          ...lines.map(({ k, dots, points }) => {
            const color = style(`--c${k % 8}`);
            const marks = { show: dots || points.length <= 60, size: 7, fill: color };
            return { stroke: color, width: 2, dash: dash(k), spanGaps: true, points: marks, ...(dots && { paths: () => null }) };
          }),
        ],
        hooks: { setCursor: [follow] },
      },
      data,
      place,
    );
    plot.root.setAttribute("role", "img");
    plot.root.setAttribute("aria-label", `${spec.title}: ${choice.value.value}, ${spec.unit}, against ${axis.title}; ${lines.length} curves. The slider below reads them out.`);
    const share = slider.max > 0 ? slider.value / slider.max : 1;
    view = { axis, lines, places: data[0] };
    slider.max = data[0].length - 1;
    slider.value = Math.round(share * slider.max);
    read();
  };

  // The value of a curve at a position: its own point, or the straight line between two; none outside of it.
  const valueAt = (points, at, dots) => {
    const after = points.findIndex((point) => point[0] >= at);
    if (after < 0) return null;
    if (points[after][0] === at) return points[after][1];
    if (after === 0 || dots) return null;
    const [[x0, y0], [x1, y1]] = [points[after - 1], points[after]];
    return y0 + ((y1 - y0) * (at - x0)) / (x1 - x0);
  };

  const read = () => {
    values.forEach((output) => (output.textContent = ""));
    if (!view) return (shown.textContent = "–");
    const at = view.places[slider.value], said = [];
    for (const line of view.lines) {
      const value = valueAt(line.points, at, line.dots);
      if (value === null) continue;
      const text = Math.abs(value) >= 1e-3 ? value.toPrecision(4) : value.toExponential(2);
      values[line.k].textContent = text;
      said.push(`${spec.series[line.k].label} ${text}`);
    }
    shown.textContent = `${short(at)} ${view.axis.key === "lr" || view.axis.key === "mbit" ? "" : view.axis.key}`.trim();
    slider.setAttribute("aria-valuetext", `${view.axis.title} ${short(at)}: ${said.join("; ")}`);
  };

  const follow = ({ cursor }) => {
    if (!view || cursor.idx == null || cursor.left < 0 || Number(slider.value) === cursor.idx) return;
    slider.value = cursor.idx;
    read();
  };

  spec.series.forEach((series, k) => {
    const item = document.createElement("li"), label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: series.shown });
    const name = Object.assign(document.createElement("span"), { className: "name", textContent: series.label });
    const value = Object.assign(document.createElement("span"), { className: "value" });
    const swatch = document.createElement("span");
    swatch.className = Object.values(series.lines).every((line) => line.dots) ? "swatch dots" : `swatch dash-${DASHES.indexOf(dash(k))}`;
    swatch.style.setProperty("--look", `var(--c${k % 8})`);
    label.append(box, swatch, name, value);
    item.append(label);
    legend.append(item);
    boxes.push(box);
    values.push(value);
    box.addEventListener("change", draw);
  });
  slider.addEventListener("input", () => {
    read();
    plot.setCursor({ left: plot.valToPos(view.places[slider.value], "x"), top: 10 }, false);
  });
  for (const control of Object.values(choice)) control.addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let width = 0;
  new ResizeObserver(() => {
    if (place.clientWidth !== width) (width = place.clientWidth), draw();
  }).observe(place);
};
