// The arithmetic of a plan: report/even.py (amounts of an evenly cut mesh), report/temporaries.py and
// planner/estimate.py (seconds, days, money), function by function and letter by letter; a test holds that the two
// agree. Constants come with the page, from those files. No document is touched here.

const Calculator = (constants) => {
  const { FLOAT, HALF, DOUBLE, STEPS, FLOPS_PER_BYTE, PASSES, TOUCHES, WRITES, SURVEYED, GRAM_ROUNDS } = constants;
  const { IN_FLIGHT, BUCKET, DAY } = constants;
  const product = (numbers) => numbers.reduce((a, b) => a * b, 1);
  const total = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const allReduce = (size, ranks) => ((2 * (ranks - 1)) / ranks) * size;

  // --- even.py

  const pieceOf = (kind, mesh) => {
    const axes = [["tp", mesh.tp, kind.tp], ["fsdp", mesh.fsdp, kind.fsdp]];
    const cut = (side) => axes.filter((axis) => axis[2] === side).map(([name, size]) => [name, size]);
    const rows = cut("rows"), columns = cut("columns");
    const here = kind.count / (kind.fsdp === "stack" ? mesh.fsdp : 1);
    const m = kind.m / product(rows.map((axis) => axis[1]));
    const n = kind.n / product(columns.map((axis) => axis[1]));
    const cutting = product([...rows, ...columns].map((axis) => axis[1]));
    const bucket = Math.min(here, Math.max(1, Math.floor(BUCKET / (FLOAT * m * n))));
    return { here, m, n, rows, columns, cutting, bucket, entries: here * m * n };
  };

  const thin = (kind, row) =>
    row.rule === "dion" || row.rule === "dion_tail" ? Math.ceil(row.rank * Math.min(kind.m, kind.n)) : 0;

  const rounds = ({ m, n }, form) =>
    2 * Math.max(m, n) > 3 * Math.min(m, n) && form !== "redundant" ? GRAM_ROUNDS : STEPS;
  const touches = (row, kind) => TOUCHES[row.rule] * (row.rule === "muon" ? rounds(kind, row.form) : 1);

  const flopsOf = (kind, row) => {
    const { m, n } = kind, r = thin(kind, row);
    const d = Math.min(m, n), D = Math.max(m, n);
    if (row.rule === "muon") {
      const count = rounds(kind, row.form), polar = count * 4 * D * d ** 2 + (8 * STEPS - 6 * count) * d ** 3;
      return { divisible: 0, shared: polar, whole: polar, applied: 0 };
    }
    if (row.rule === "dion") {
      const orthonormal = 2 * (4 * n * r ** 2 + (2 / 3) * r ** 3);
      const applied = 2 * m * n * r;
      return { divisible: 4 * m * n * r, shared: 4 * m * n * r + orthonormal, whole: orthonormal, applied };
    }
    const orthonormal = 2 * (4 * (m + n) * r ** 2 + (4 / 3) * r ** 3);
    const taller = 2 * (4 * D * r ** 2 + (2 / 3) * r ** 3);
    return { divisible: 2 * m * n * r, shared: 4 * m * n * r + orthonormal, whole: taller, applied: 0 };
  };

  const accesses = (kind, row, own) => {
    const rule = row.rule, products = touches(row, kind);
    if (own === 1) return [products, PASSES[rule]];
    const all = (PASSES[rule] + products - SURVEYED[rule]) / own + SURVEYED[rule];
    const touched = (products - WRITES[rule]) / own + WRITES[rule];
    return [touched, all - touched];
  };

  const work = (kind, piece, mesh, row, one, replicas) => {
    if (row.form === "redundant") return [kind.count * one.shared, 0];
    if (row.form === "gram") {
      const d = Math.min(kind.m, kind.n), D = Math.max(kind.m, kind.n);
      const polynomial = STEPS * 8 * d ** 3;
      return [(piece.here * (GRAM_ROUNDS * 4 * D * d ** 2 + polynomial)) / piece.cutting, polynomial];
    }
    const [sharing, own] = ["split", "own"].map((way) => (replicas === way ? mesh.dp : 1));
    const even = (one.divisible - one.applied + one.shared / sharing) / own + one.applied;
    return [(piece.here * even) / piece.cutting, one.whole];
  };

  const counter = (mesh) => {
    const byAxis = Object.fromEntries(Object.keys(mesh).map((name) => [name, 0]));
    return {
      byAxis,
      sum(size, axes) {
        for (const [name, a] of axes) byAxis[name] += allReduce(size, a);
      },
      deal(c, size, partial, cut) {
        for (const [name, a] of partial) {
          byAxis[name] += allReduce(c * size, a);
          c /= a;
        }
        for (const [name, a] of cut) {
          byAxis[name] += allReduce(c * size, a);
          c /= a;
          size *= a;
        }
      },
    };
  };

  const sendFactors = (sent, c, mine, piece, r, rule, averaged) => {
    const { rows, columns } = piece;
    const P = FLOAT * piece.n * r, R = FLOAT * piece.m * r;
    sent.sum(c * DOUBLE, [...rows, ...columns, ...averaged]);
    if (rule === "dion") {
      sent.deal(mine, P, [...rows, ...averaged], [...columns].reverse());
      sent.sum(mine * R, [...columns, ...averaged]);
      sent.sum(mine * FLOAT * r, rows);
      return P + R + FLOAT * r;
    }
    sent.sum(c * FLOAT * piece.m, columns);
    sent.sum(c * FLOAT, rows);
    sent.deal(mine, P, rows, [...columns].reverse());
    sent.sum(mine * R, columns);
    sent.deal(mine, R, [], [...rows].reverse());
    sent.sum(mine * FLOAT * r, rows);
    return P + 2 * R + FLOAT * r;
  };

  const send = (sent, kind, piece, mesh, row, replicas) => {
    const cut = [...piece.rows, ...piece.columns];
    const size = FLOAT * piece.m * piece.n;
    if (row.form === "redundant") {
      let whole = piece.here * size;
      const stack = kind.fsdp === "stack" ? [["fsdp", mesh.fsdp]] : [];
      for (const [name, a] of [...stack, ...cut.reverse()]) {
        whole *= a;
        sent.byAxis[name] += (whole * (a - 1)) / a;
      }
      return;
    }
    if (row.form === "gram") {
      sent.deal(piece.here, GRAM_ROUNDS * HALF * Math.min(kind.m, kind.n) ** 2, cut, []);
      return;
    }
    const c = piece.here / (replicas === "own" ? mesh.dp : 1), mine = c / (replicas === "split" ? mesh.dp : 1);
    let results = size, published = size;
    if (row.rule === "muon") sent.deal(mine, size, [], [...[...piece.rows].reverse(), ...[...piece.columns].reverse()]);
    else {
      const r = thin(kind, row), averaged = replicas === "factors" ? [["dp", mesh.dp]] : [];
      results = sendFactors(sent, c, mine, piece, r, row.rule, averaged);
      published = FLOAT * (piece.m + piece.n) * r;
    }
    if (replicas === "split" || replicas === "own")
      sent.byAxis.dp += (mesh.dp - 1) * mine * (replicas === "own" ? published : results);
  };

  const replicasOf = (kind, piece, mesh, row) => {
    if (row.replicas !== "auto" || mesh.dp === 1) return row.replicas === "auto" ? "repeat" : row.replicas;
    const weight = (way) => {
      const sent = counter(mesh);
      send(sent, kind, piece, mesh, row, way);
      const [even] = work(kind, piece, mesh, row, flopsOf(kind, row), way);
      return even + FLOPS_PER_BYTE * total(Object.values(sent.byAxis));
    };
    return weight("split") <= weight("repeat") ? "split" : "repeat";
  };

  // --- temporaries.py

  const temporariesOf = (kind, piece, row, underWay, owners) => {
    const { m, n } = kind, { m: pm, n: pn } = piece, b = piece.bucket / owners, r = thin(kind, row), d = Math.min(m, n);
    if (row.rule === "adamw") return 0;
    if (row.form === "redundant") return 2 * FLOAT * m * n + HALF * (2 * m * n + 2 * d * d);
    const own = Math.ceil(b / piece.cutting);
    if (row.form === "gram")
      return underWay * (b * (2 * FLOAT * pm * pn + HALF * d * d) + 3 * HALF * own * d * d);
    if (row.rule === "muon")
      return FLOAT * underWay * (b * 2 * pm * pn + own * 2 * m * n) + HALF * own * (2 * m * n + 4 * d * d);
    const lengths = row.rule === "dion_tail" ? 2 * pm : 0;
    return FLOAT * underWay * (b * (2 * (pm + pn) * r + lengths) + own * 3 * n * r);
  };

  const scalarsOf = (model, mesh) => model.scalars[0] / (mesh.fsdp * mesh.tp) + model.scalars[1] / mesh.fsdp;

  const amounts = (model, mesh, row) => {
    const sent = counter(mesh), synced = {};
    let flops = 0, touched = 0, passes = 0, state = 0, held = 0, single = 0, here = 0;
    const pieces = model.kinds.map((kind) => [kind, pieceOf(kind, mesh)]);
    const underWay = Math.min(IN_FLIGHT, total(pieces.map(([, piece]) => Math.ceil(piece.here / piece.bucket))));
    for (const [kind, piece] of pieces) {
      here += piece.entries;
      if (row.rule === "adamw") {
        state += 2 * FLOAT * piece.entries;
        passes += PASSES.adamw * FLOAT * piece.entries;
        continue;
      }
      const own = row.replicas === "own" ? mesh.dp : 1, replicas = replicasOf(kind, piece, mesh, row);
      const [even, largest] = work(kind, piece, mesh, row, flopsOf(kind, row), replicas);
      flops += even;
      single = Math.max(single, largest);
      send(sent, kind, piece, mesh, row, replicas);
      const [hereTouched, herePasses] = accesses(kind, row, own);
      touched += FLOAT * hereTouched * piece.entries * (row.form === "redundant" ? piece.cutting : 1);
      passes += FLOAT * herePasses * piece.entries;
      state += (FLOAT * (piece.entries + piece.here * piece.m * thin(kind, row))) / own;
      held = Math.max(held, temporariesOf(kind, piece, row, underWay, own));
    }
    const scalars = scalarsOf(model, mesh);
    state += 2 * FLOAT * scalars + FLOAT * (row.rule === "adamw" ? model.parameters : model.tensors);
    for (const [name, a] of Object.entries(mesh))
      sent.byAxis[name] += allReduce(DOUBLE * (2 * model.parameters + 3), a);
    if (row.replicas === "factors") sent.byAxis.dp += allReduce(FLOAT * scalars, mesh.dp);
    else synced.dp = allReduce(FLOAT * (here + scalars), mesh.dp);
    return {
      products: row.rule === "muon" ? "polar" : "factors",
      flops: Math.max(flops, single),
      touched,
      passes: passes + FLOAT * PASSES.adamw * scalars,
      sent: sent.byAxis,
      synced,
      state,
      temporaries: held,
    };
  };

  // --- estimate.py

  const links = (mesh, perNode) => {
    const found = {};
    let stretch = 1;
    for (const [name, size] of Object.entries(mesh).reverse()) {
      stretch *= size;
      found[name] = stretch <= perNode ? "intra" : "inter";
    }
    return found;
  };

  const modelSeconds = (machine, job) =>
    (6 * job.active * job.tokens_per_step) / (job.ranks * machine.peak * job.utilization);

  const times = (amount, mesh, machine, job) => {
    const link = links(mesh, machine.per_node);
    const seconds = (bytes, kind) =>
      total(Object.entries(bytes).map(([axis, size]) => (!kind || link[axis] === kind ? size / machine[link[axis]] : 0)));
    const products = Math.max(amount.flops / machine[amount.products], amount.touched / machine.memory);
    const passes = amount.passes / machine.memory;
    const intra = seconds(amount.sent, "intra"), inter = seconds(amount.sent, "inter");
    const sync = seconds(amount.synced), model = modelSeconds(machine, job);
    const optimizer = products + passes + intra + inter;
    const step = model + sync + optimizer;
    return { products, passes, intra, inter, sync, model, optimizer, step, overhead: (optimizer + sync) / model };
  };

  const days = (step, job) => ((job.tokens / job.tokens_per_step) * step) / DAY;
  const cost = (runDays, job) => runDays * 24 * job.ranks * job.price;

  // A whole row; ``mesh`` in the order dp, fsdp, tp. ``memory``: of weights, gradients, state and temporaries.
  const plan = (model, mesh, row, machine, job) => {
    const amount = amounts(model, mesh, row), time = times(amount, mesh, machine, job);
    const run = days(time.step, job);
    const weights = FLOAT * (total(model.kinds.map((kind) => pieceOf(kind, mesh).entries)) + scalarsOf(model, mesh));
    const memory = 2 * weights + amount.state + amount.temporaries;
    return { amounts: amount, times: time, days: run, cost: cost(run, job), memory, fits: memory <= machine.capacity };
  };

  return { amounts, times, links, days, cost, plan };
};
