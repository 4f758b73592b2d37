"use strict";
// Everything a rollout says is hostile text: it is only ever set as text, never as markup.
// One file, long as it is: it is one closure, which stands in the page whole and is let run by its hash.
(() => {
  const root = document.documentElement;
  window.addEventListener("error", (e) => { root.dataset.error = String(e.message); });
  let data, sources, runs, rollouts, tops, many;
  const page = document.getElementById("page");
  const tip = document.getElementById("tip");
  const SVG = "http://www.w3.org/2000/svg";
  const DASH = ["", "6 3", "2 2", "9 3 2 3", "12 4", "4 2 1 2 1 2"];

  // --- small tools -------------------------------------------------------------------------

  // What turns text about, or would not be seen, is shown by its number.
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]/u;
  const code = (char) => "U+" + char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  function visible(text, plain) {
    if (!HIDDEN.test(text)) return [text];
    return Array.from(text).reduce((found, char) => {
      if (HIDDEN.test(char)) {
        if (plain) found.push(`<${code(char)}>`);
        else {
          const mark = document.createElement("span");
          mark.className = "hidden-char";
          mark.textContent = code(char);
          found.push(mark);
        }
      } else if (typeof found[found.length - 1] === "string") found[found.length - 1] += char;
      else found.push(char);
      return found;
    }, []);
  }

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value === true ? "" : name === "srcdoc" ? value : visible(String(value), true).join(""));
    }
    for (const child of children.flat(Infinity)) {
      if (child === null || child === undefined || child === false) continue;
      if (child instanceof Node) node.append(child);
      else node.append(...visible(String(child), node instanceof SVGElement || node.nodeName === "OPTION"));
    }
    return node;
  }
  const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) =>
    fill(document.createElementNS(SVG, tag), attributes, children);

  function num(value, digits = 4) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
    return String(Number(value.toPrecision(digits)));
  }
  const percent = (value) => (value === null || value === undefined ? "–" : (value * 100).toFixed(1) + " %");
  const color = (i) => `var(--c${i % 8})`;

  const swatch = (paint, dash = 0) => svg("svg", { class: "swatch", width: 24, height: 8 },
    svg("line", { x1: 0, x2: 24, y1: 4, y2: 4, stroke: paint, "stroke-width": 2.5, "stroke-dasharray": DASH[dash] }));

  function showTip(event, ...children) {
    tip.replaceChildren(...children);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - box.width - 14 : event.clientX + 14;
    const top = event.clientY + 14 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 14;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = Math.max(4, top) + "px";
  }
  const hideTip = () => { tip.hidden = true; };

  function seconds(from, to) {
    const s = (Date.parse(to) - Date.parse(from)) / 1000;
    return Number.isFinite(s) ? s : null;
  }
  function duration(s) {
    if (s === null || s === undefined) return "–";
    if (s < 60) return s.toFixed(0) + " s";
    if (s < 3600) return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
    return `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
  }

  // --- charts ------------------------------------------------------------------------------

  function ticks(low, high, count) {
    const raw = (high - low) / Math.max(count, 1);
    const power = Math.pow(10, Math.floor(Math.log10(raw)));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found.map((t) => Number(t.toPrecision(10)));
  }

  function smoothed(points, weight) {
    // Exponential moving average with the start-up bias divided out.
    let sum = 0, norm = 0;
    return points.map(([x, y]) => {
      if (y === null) return [x, null];
      sum = weight * sum + (1 - weight) * y;
      norm = weight * norm + (1 - weight);
      return [x, sum / norm];
    });
  }

  // What the reader has chosen; it outlives new data.
  const state = { smoothing: null, pair: "", level: "",
    tasks: { query: "", show: "", by: "", down: true, page: 0 },
    browser: { run: "", step: "", split: "", reward: "", kind: "", query: "", task: "", page: 0, current: "" } };
  let smoothing = 0;
  const redraws = [];

  // Of several runs the colour is told once, above the charts; here only what the dashes mean.
  function legend(series, options) {
    const entries = runs.length < 2 || options.tall ? series.map((s) => [s.label, s.color, s.dash])
      : [...new Map(series.map((s) => [s.metric, s.dash]))].map(([label, dash]) => [label, "var(--soft)", dash]);
    return entries.length < 2 ? null : el("div", { class: "legend" },
      entries.map(([label, paint, dash]) => el("span", {}, swatch(paint, dash), label)));
  }

  // series: {label, color, dash, points: [[x, y]], ci: [[x, low, high]], band: [[x, low, high]], dots, fixed}
  function chart(title, sub, series, options = {}) {
    series = series.filter((s) => s.points.some((p) => p[1] !== null));
    if (!series.length) return null;
    const format = options.percent ? (v) => Math.round(v * 1000) / 10 + "%" : (v) => num(v, 4);
    const host = el("div", { class: "plot" });
    const node = el("section", { class: "chart", "data-chart": title },
      el("h3", {}, title), el("div", { class: "sub" }, sub), host,
      legend(series, options));
    const height = options.tall ? 240 : 170;

    function draw() {
      const width = Math.max(180, host.clientWidth || 360);
      const box = { left: 46, right: 8, top: 8, bottom: 22 };
      const all = series.flatMap((s) => s.points.map((p) => p[1])
        .concat((s.ci || []).flatMap((c) => [c[1], c[2]]), (s.band || []).flatMap((c) => [c[1], c[2]])))
        .filter((v) => v !== null);
      const xs = series.flatMap((s) => s.points.map((p) => p[0]));
      let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
      if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
      let [y0, y1] = [Math.min(...all), Math.max(...all)];
      if (options.min !== undefined) y0 = Math.min(y0, options.min);
      if (options.max !== undefined) y1 = Math.max(y1, options.max);
      if (y0 === y1) [y0, y1] = y0 === 0 ? [0, 1] : [y0 - Math.abs(y0) * 0.1, y1 + Math.abs(y1) * 0.1];
      const pad = (y1 - y0) * 0.05;
      if (y0 !== 0 && y0 !== options.min) y0 -= pad;
      if (y1 !== options.max) y1 += pad;
      const across = (x) => box.left + ((x - x0) / (x1 - x0)) * (width - box.left - box.right);
      let px = across;
      const py = (y) => height - box.bottom - ((y - y0) / (y1 - y0)) * (height - box.top - box.bottom);
      const canvas = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img",
        "aria-label": `${title} over training steps` });
      for (const t of ticks(y0, y1, options.tall ? 5 : 4)) {
        canvas.append(svg("line", { class: "grid", x1: box.left, x2: width - box.right, y1: py(t), y2: py(t) }),
          svg("text", { x: box.left - 6, y: py(t) + 4, "text-anchor": "end" }, format(t)));
      }
      for (const t of ticks(x0, x1, width / 80).filter(Number.isInteger)) {
        canvas.append(svg("text", { x: px(t), y: height - 6, "text-anchor": "middle" }, String(t)));
      }
      canvas.append(svg("line", { class: "axis", x1: box.left, x2: width - box.right,
        y1: height - box.bottom, y2: height - box.bottom }));

      const path = (points) => {
        let d = "", pen = false;
        for (const [x, y] of points) {
          if (y === null) { pen = false; continue; }
          d += `${pen ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`;
          pen = true;
        }
        return d;
      };
      for (const s of series) {
        px = s.ci ? (x) => across(x) + s.shift : across; // side by side, or whiskers would hide whiskers
        if (s.band && s.band.length) {
          const rim = s.band.map((b) => `${px(b[0]).toFixed(1)},${py(b[2]).toFixed(1)}`)
            .concat(s.band.slice().reverse().map((b) => `${px(b[0]).toFixed(1)},${py(b[1]).toFixed(1)}`));
          canvas.append(svg("polygon", { points: rim.join(" "), fill: s.color, opacity: 0.12 }));
        }
        for (const [x, low, high] of s.ci || []) {
          canvas.append(svg("path", { class: "ci", stroke: s.color, opacity: 0.65, fill: "none",
            d: `M${px(x) - 3} ${py(low)}h6M${px(x)} ${py(low)}V${py(high)}M${px(x) - 3} ${py(high)}h6` }));
        }
        const smooth = smoothing > 0 && !s.fixed && s.points.length > 3;
        const line = { fill: "none", stroke: s.color, "stroke-linejoin": "round", "stroke-dasharray": DASH[s.dash || 0] };
        if (smooth) {
          canvas.append(svg("path", { ...line, d: path(s.points), "stroke-width": 1, opacity: 0.3 }));
        }
        canvas.append(svg("path", { ...line, d: path(smooth ? smoothed(s.points, smoothing) : s.points),
          "stroke-width": 1.8 }));
        const lone = s.points.filter((p) => p[1] !== null).length === 1;
        if (s.dots || lone) {
          for (const [x, y] of s.points) {
            if (y !== null) canvas.append(svg("circle", { cx: px(x), cy: py(y), r: 3.2, fill: s.color }));
          }
        }
        for (const [x, y] of s.points) { // what was not finite is shown where it happened
          if (y === null) {
            canvas.append(svg("path", { class: "lost", stroke: "var(--bad)", "stroke-width": 1.5,
              d: `M${px(x) - 3} ${box.top}l6 6m-6 0l6 -6` }));
          }
        }
      }
      px = across;
      const cross = svg("line", { class: "cross", y1: box.top, y2: height - box.bottom, visibility: "hidden" });
      const marks = svg("g");
      const sheet = svg("rect", { x: box.left, y: 0, width: Math.max(1, width - box.left - box.right),
        height: height - box.bottom, fill: "transparent" });
      const known = [...new Set(xs)].sort((a, b) => a - b);
      sheet.addEventListener("mousemove", (event) => {
        const at = x0 + ((event.clientX - canvas.getBoundingClientRect().left - box.left)
          / (width - box.left - box.right)) * (x1 - x0);
        const x = known.reduce((best, k) => (Math.abs(k - at) < Math.abs(best - at) ? k : best));
        fill(cross, { x1: px(x), x2: px(x), visibility: "visible" }, []);
        marks.replaceChildren();
        const lines = [el("div", {}, el("b", {}, `step ${x}`))];
        for (const s of series) {
          const hit = s.points.find((p) => p[0] === x);
          if (!hit) continue;
          const ci = (s.ci || []).find((c) => c[0] === x);
          const band = (s.band || []).find((c) => c[0] === x);
          const extent = ci || band;
          if (hit[1] !== null) marks.append(svg("circle", { cx: px(x), cy: py(hit[1]), r: 3.5, fill: s.color }));
          lines.push(el("div", {}, el("span", {}, swatch(s.color, s.dash), s.label),
            el("span", {}, (hit[1] === null ? "not finite" : format(hit[1]))
              + (extent ? `  [${format(extent[1])}, ${format(extent[2])}]` : ""))));
        }
        showTip(event, ...lines);
      });
      sheet.addEventListener("mouseleave", () => {
        cross.setAttribute("visibility", "hidden");
        marks.replaceChildren();
        hideTip();
      });
      canvas.append(cross, marks, sheet);
      host.replaceChildren(canvas);
    }
    redraws.push(draw);
    return node;
  }

  // One line per run for one metric, or per run and metric for several.
  function lines(metrics, extra = {}) {
    const found = [];
    runs.forEach((run) => metrics.forEach(([name, label], m) => {
      const points = run.series[name];
      if (!points) return;
      const several = metrics.length > 1;
      found.push({
        label: runs.length > 1 ? (several ? `${run.name}: ${label}` : run.name) : label,
        color: runs.length > 1 ? color(sources.indexOf(run)) : color(m), dash: runs.length > 1 && several ? m % DASH.length : 0, points, metric: label,
        shift: runs.length > 1 ? (runs.indexOf(run) - (runs.length - 1) / 2) * 5 : 0, ...(typeof extra === "function" ? extra(run) : extra),
      });
    }));
    return found;
  }

  const SD = "self_distillation/";
  const used = new Set();
  function plot(title, sub, metrics, options = {}, extra = {}) {
    metrics.forEach(([name]) => used.add(name));
    return chart(title, sub, lines(metrics, extra), options);
  }

  function curves() {
    if (!runs.length) return [];
    const rates = { percent: true, min: 0, max: 1 };
    ["eval/pass_rate", "completions/min_length", "completions/max_length", "step"].forEach((n) => used.add(n));
    const main = [
      plot("Training reward", "mean over the rollouts of a step", [["reward", "reward"]], { tall: true, min: 0, always: true }),
      plot("Held-out pass rate", "bars: 95 % confidence interval over tasks and samples", [["eval/pass_rate", "pass rate"]],
        { ...rates, tall: true, always: true }, (run) => ({ ci: run.ci, dots: true, fixed: true })),
    ];
    const band = (run) => {
      if (runs.length > 1) return {}; // bands of several runs would be one grey blur
      const low = run.series["completions/min_length"], high = new Map(run.series["completions/max_length"] || []);
      return { band: (low || []).filter(([x, y]) => y !== null && high.get(x) != null).map(([x, y]) => [x, y, high.get(x)]) };
    };
    const kinds = [...new Set(runs.flatMap((run) => Object.keys(run.kinds)))];
    const kindLines = runs.flatMap((run) => kinds.filter((k) => run.kinds[k]).map((k) => ({
      label: runs.length > 1 ? `${run.name}: ${k}` : k, color: runs.length > 1 ? color(sources.indexOf(run)) : color(kinds.indexOf(k)),
      dash: runs.length > 1 ? kinds.indexOf(k) % DASH.length : Math.floor(kinds.indexOf(k) / 8) % DASH.length, points: run.kinds[k],
      metric: k,
    })));
    const small = [
      plot("Loss", "as minimised", [["loss", "loss"]]),
      plot("Teacher–student divergence", "mean over distilled tokens, nats", [[SD + "teacher_student_kl", "KL"]], { min: 0 }),
      plot("Entropy", "of the sampled tokens, nats", [["entropy", "entropy"]], { min: 0 }),
      plot("Completion length", runs.length > 1 ? "mean tokens" : "mean tokens; band: shortest to longest", [["completions/mean_length", "mean length"]], { min: 0 }, band),
      plot("Gradient norm", "before clipping", [["grad_norm", "gradient norm"]], { min: 0 }),
      chart("Feedback by kind", "share of training rollouts that got it", kindLines, rates),
      plot("Self-distillation", "shares of samples (or groups)", [
        [SD + "success_group_fraction", "groups with a success"],
        [SD + "success_sample_fraction", "samples with a sibling's success"],
        [SD + "feedback_available_fraction", "feedback available"],
        [SD + "feedback_used_fraction", "feedback used"],
        [SD + "reprompt_sample_fraction", "reprompted"]], rates),
      plot("Lost signal", "groups with equal rewards; completions cut off", [
        ["frac_reward_zero_std", "equal rewards"], ["completions/clipped_ratio", "cut off"]], rates),
      plot("Time per step", "seconds", [["time/rollout", "rollout"], ["time/teacher", "teacher"],
        ["time/update", "update"], ["time/eval", "evaluation"]], { min: 0 }),
    ];
    const rest = [...new Set(runs.flatMap((run) => Object.keys(run.series)))].filter((n) => !used.has(n)).sort();
    const others = rest.map((name) => plot(name, "", [[name, name]]));
    const shown = main.concat(small, others).filter(Boolean);
    if (!shown.length) return [el("h2", {}, "Curves"), el("p", { class: "empty" }, "No step has been logged yet.")];
    if (runs.some((run) => (run.series.reward || []).length > 40)) smoothing = 0.6;
    if (state.smoothing !== null) smoothing = state.smoothing;
    const smooth = el("select", { id: "smoothing", onchange: (e) => { smoothing = state.smoothing = Number(e.target.value); redraw(); } },
      [["none", 0], ["light", 0.6], ["strong", 0.9]].map(([label, value]) => el("option", { value, selected: value === smoothing }, label)));
    const key = runs.length > 1 ? el("div", { class: "legend" }, runs.map((run) => el("span", {}, swatch(color(sources.indexOf(run))), run.name))) : null;
    const nodes = [
      el("h2", {}, "Curves", el("small", {}, "over training steps"
        + (runs.some((run) => run.thinned) ? "; long curves are thinned" : "")), el("span", { class: "spring" }),
        el("span", { class: "bar" }, el("label", {}, "smoothing", smooth))), key,
      el("div", { class: "charts main" }, main), el("div", { class: "charts" }, small),
    ];
    if (others.some(Boolean)) {
      const more = el("details", { class: "more", id: "more-metrics", ontoggle: () => redraw() },
        el("summary", {}, `${others.filter(Boolean).length} more metrics`), el("div", { class: "charts" }, others));
      nodes.push(more);
    }
    return nodes;
  }
  const redraw = () => redraws.forEach((draw) => draw());

  // --- header ------------------------------------------------------------------------------

  const STATUS = { done: "good", failed: "bad", interrupted: "warn", running: "info" };
  function ends(points) {
    const good = (points || []).filter((p) => p[1] !== null);
    return good.length ? [good[0][1], good[good.length - 1][1]] : null;
  }
  function change(pair, format) {
    if (!pair) return "–";
    return pair[0] === pair[1] ? format(pair[1]) : `${format(pair[0])} → ${format(pair[1])}`;
  }
  const counted = (n, one, several = one + "s") => `${n} ${n === 1 ? one : several}`;
  const lastOf = (text) => text.split("/").slice(-2).join("/");
  const swatched = (run) => el("td", {}, swatch(color(sources.indexOf(run))), run.name);

  // Columns that say nothing for any row are left out.
  function overview(id, rows, columns) {
    const cells = rows.map((row) => columns.map(([, value]) => value(row)));
    const kept = columns.map((_, c) => c).filter((c) => cells.some((row) => row[c] !== "" && row[c] !== "–" && row[c] !== null));
    return el("div", { class: "scroll runs" }, el("table", { id },
      el("thead", {}, el("tr", {}, kept.map((c) => el("th", { class: columns[c][2] ? "num" : null }, columns[c][0])))),
      el("tbody", {}, cells.map((row) => el("tr", {}, kept.map((c) => (row[c] instanceof Node && row[c].nodeName === "TD" ? row[c]
        : el("td", { class: columns[c][2] ? "num" : null }, row[c] === "" || row[c] === null ? "–" : row[c]))))))));
  }

  // A rate and its interval on a line from 0 to 1.
  function whisker(rate, low, high, paint) {
    const at = (v) => 4 + v * 82;
    return svg("svg", { class: "whisker", width: 90, height: 16, role: "img", "aria-label": `${percent(low)} to ${percent(high)}` },
      svg("line", { class: "rail", x1: 4, x2: 86, y1: 8, y2: 8 }),
      svg("line", { x1: at(low), x2: at(high), y1: 8, y2: 8, stroke: paint, "stroke-width": 3, opacity: 0.45 }),
      svg("circle", { cx: at(rate), cy: 8, r: 4, fill: paint }));
  }

  function header() {
    const evals = sources.filter((source) => source.kind === "eval");
    const title = !many ? sources[0].name
      : [runs.length ? counted(runs.length, "run") : "", evals.length ? counted(evals.length, "evaluation") : ""].filter(Boolean).join(", ");
    const theme = el("button", { class: "plain", type: "button", "aria-label": "switch light and dark",
      onclick: () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; } }, "◐ theme");
    const nodes = [el("div", { class: "top" },
      el("div", {}, el("div", { class: "kicker" }, runs.length && evals.length ? "rlrf report" : runs.length ? "rlrf training report" : "rlrf evaluation"),
        el("h1", {}, title)),
      el("span", { class: "bar" }, el("span", { id: "live", class: "note" }), theme))];
    nodes.push(warnings());
    if (runs.length) {
      nodes.push(overview("runs", runs, [
        ["Run", swatched],
        ["Status", (run) => el("td", {}, el("span", { class: "badge " + (STATUS[run.facts.status] || "") }, run.facts.status))],
        ["Trainer", (run) => run.facts.trainer],
        ["Environment", (run) => run.facts.env + (run.facts.feedback ? ` (${run.facts.feedback})` : "")],
        ["Model", (run) => lastOf(run.facts.model)],
        ["Steps", (run) => run.facts.steps, true],
        ["Duration", (run) => duration(seconds(run.facts.started, run.facts.finished)), true],
        ["Training reward", (run) => change(ends(run.series.reward), (v) => num(v, 3)), true],
        ["Held-out pass rate", (run) => change(ends(run.series["eval/pass_rate"]), percent), true],
        ["95 % CI at the end", (run) => {
          const last = run.ci[run.ci.length - 1];
          return last ? `${percent(last[1])} – ${percent(last[2])}` : "–";
        }, true],
      ]));
    }
    if (evals.length) {
      const most = (report) => Math.max(1, ...Object.keys(report.pass_at_k).map(Number));
      nodes.push(overview("evals", evals, [
        ["Evaluation", swatched],
        ["Status", (e) => el("td", {}, el("span", { class: "badge " + (e.facts.done ? "good" : "info") },
          e.facts.done ? "done" : `${e.report.n_rollouts} of ${e.facts.wanted || "?"}`))],
        ["Environment", (e) => e.facts.env + (e.facts.feedback ? ` (${e.facts.feedback})` : "")],
        ["Policy", (e) => [e.facts.policy, e.facts.model && e.facts.model !== "null" ? e.facts.model.split("/").pop() : ""].filter(Boolean).join(": ")],
        ["Split", (e) => e.facts.split],
        ["Tasks", (e) => e.report.n_tasks, true],
        ["Rollouts", (e) => e.report.n_rollouts, true],
        ["Pass rate", (e) => percent(e.report.pass_rate), true],
        ["95 % CI", (e) => (e.report.pass_rate_ci ? el("td", { class: "ci-cell" },
          whisker(e.report.pass_rate, ...e.report.pass_rate_ci, color(sources.indexOf(e))),
          ` ${percent(e.report.pass_rate_ci[0])} – ${percent(e.report.pass_rate_ci[1])}`) : "–")],
        ["pass@k", (e) => (most(e.report) > 1 ? `@${most(e.report)}: ${percent(e.report.pass_at_k[most(e.report)])}` : "–"), true],
        ["Reward", (e) => num(e.report.mean_reward, 3), true],
        ["Tokens", (e) => num(e.report.mean_length, 3), true],
        ["Unscored", (e) => e.report.n_unscored || "–", true],
      ]));
    }
    return nodes;
  }

  function warnings() {
    const all = sources.flatMap((source) => source.warnings.map(([level, told]) => [source, level, told]));
    if (!all.length) return null;
    const line = ([source, level, told]) => el("li", { class: level === "error" ? "bad" : null },
      many ? el("b", {}, `${source.name}: `) : null, told);
    const FEW = 5;
    return el("section", { class: "warnings", id: "warnings", "aria-label": "warnings" },
      el("ul", {}, all.slice(0, FEW).map(line)),
      all.length > FEW ? el("details", { id: "more-warnings" }, el("summary", {}, `${all.length - FEW} more`), el("ul", {}, all.slice(FEW).map(line))) : null);
  }

  // --- two evaluations, task by task ---------------------------------------------------------

  const pairKey = (c) => `${c.a}-${c.b}`;
  function pairNow() {
    return data.comparisons.find((c) => pairKey(c) === state.pair) || data.comparisons[0] || null;
  }
  const points = (v) => `${v > 0 ? "+" : v < 0 ? "−" : "±"}${Math.abs(v * 100).toFixed(1)}`;

  function comparison() {
    const c = pairNow();
    if (!c) return [];
    const name = (i) => data.tables[i].name;
    const select = data.comparisons.length > 1 ? el("select", { id: "pair", "aria-label": "which two", onchange: (e) => { state.pair = e.target.value; state.tasks.page = 0; again(); } },
      data.comparisons.map((o) => el("option", { value: pairKey(o), selected: o === c }, `${name(o.a)} → ${name(o.b)}`))) : null;
    const verdict = { better: "good", worse: "bad", unclear: "warn" };
    const word = { better: "better", worse: "worse", unclear: "no difference that shows" };
    const [low, high] = c.interval;
    const reach = Math.max(0.05, Math.abs(low), Math.abs(high)) * 1.1;
    const at = (v) => 160 + (v / reach) * 150;
    return [
      el("h2", {}, "Compared task by task", el("small", {}, `${counted(c.n_tasks, "task")} that both scored`), el("span", { class: "spring" }), select),
      el("div", { class: "compare", id: "compare" },
        el("div", {}, el("div", { class: "note" }, `${name(c.a)} → ${name(c.b)}`),
          el("div", { class: "big" }, `${points(c.difference)} points `, el("span", { class: "badge " + verdict[c.verdict] }, word[c.verdict])),
          el("div", { class: "note" }, `95 % interval ${points(low)} to ${points(high)}; pass rate ${percent(c.before)} → ${percent(c.after)}`),
          svg("svg", { class: "whisker", width: 320, height: 30, role: "img", "aria-label": "interval of the difference" },
            svg("line", { class: "rail", x1: 10, x2: 310, y1: 12, y2: 12 }), svg("line", { class: "rail", x1: 160, x2: 160, y1: 3, y2: 21 }),
            svg("line", { x1: at(low), x2: at(high), y1: 12, y2: 12, stroke: "var(--accent)", "stroke-width": 4, opacity: 0.45 }),
            svg("circle", { cx: at(c.difference), cy: 12, r: 4.5, fill: "var(--accent)" }),
            svg("text", { x: 160, y: 30, "text-anchor": "middle" }, "0"))),
        el("div", {}, el("div", { class: "balance" },
          [["better", c.better, "good"], ["same", c.n_tasks - c.better - c.worse, ""], ["worse", c.worse, "bad"]].map(([label, n, tone]) =>
            el("button", { type: "button", class: "part " + tone, onclick: () => { state.tasks.show = label; state.tasks.page = 0; again(); document.getElementById("tasks").scrollIntoView(); } },
              el("b", {}, String(n)), ` ${label}`))),
          el("p", { class: "note" }, `Better against worse by the exact sign test${c.better + c.worse ? "" : " (nothing to test)"}: p = ${num(c.p_value, 2)} `
            + "(with one attempt at each task McNemar's). The interval is Bonett and Price's for paired rates, over tasks."),
          c.only_a + c.only_b ? el("p", { class: "note" }, `Left out: ${counted(c.only_a, "task")} only the first scored, ${c.only_b} only the second.`) : null,
          c.differs.length ? el("p", { class: "note" }, "They were made differently: ",
            c.differs.map(([k, a, b], i) => [i ? "; " : "", el("b", {}, k), ` ${a} → ${b}`])) : null)),
    ];
  }

  // --- tasks -------------------------------------------------------------------------------

  let taskRows = [];
  function tasksOf() {
    const ids = [...new Set(data.tables.flatMap((table) => Object.keys(table.tasks)))];
    const c = pairNow();
    const rate = (cell) => (cell && cell[1] ? cell[2] / cell[1] : null);
    return ids.map((task) => {
      const cells = data.tables.map((table) => (Object.hasOwn(table.tasks, task) ? table.tasks[task] : null));
      const rates = cells.map(rate);
      const both = c && rates[c.a] !== null && rates[c.b] !== null;
      return { task, cells, rates, change: both ? rates[c.b] - rates[c.a] : null };
    });
  }

  function tasks() {
    if (!data.tables.length) return [];
    taskRows = tasksOf();
    const view = state.tasks, PAGE = 25;
    const compared = pairNow() !== null;
    const body = el("tbody", {}), count = el("span", {});
    const previous = el("button", { type: "button", "aria-label": "earlier tasks" }, "‹"), next = el("button", { type: "button", "aria-label": "later tasks" }, "›");
    const all = (row, test) => row.rates.some((r) => r !== null) && row.rates.every((r) => r === null || test(r));
    const shows = {
      "": () => true, solved: (row) => all(row, (r) => r === 1), sometimes: (row) => row.rates.some((r) => r > 0 && r < 1),
      never: (row) => all(row, (r) => r === 0), unscored: (row) => row.cells.some((c) => c && c[0] > c[1]),
      better: (row) => row.change > 0, worse: (row) => row.change !== null && row.change < 0, same: (row) => row.change === 0,
    };
    const value = (row) => (view.by === "" ? row.task : view.by === "change" ? row.change : row.rates[Number(view.by)]);
    const heads = [["", "Task"], ...data.tables.map((table, i) => [String(i), table.name]), ...(compared ? [["change", "Change"]] : [])];
    const head = el("tr", {});

    function refresh() {
      const query = view.query.toLowerCase();
      const found = taskRows.filter((row) => shows[view.show](row) && row.task.toLowerCase().includes(query));
      const sign = view.down ? 1 : -1;
      found.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null); // those without a number last
        return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
      });
      const pages = Math.max(1, Math.ceil(found.length / PAGE));
      view.page = Math.min(view.page, pages - 1);
      head.replaceChildren(...heads.map(([by, label]) => el("th", { class: by ? "num" : null, "aria-sort": view.by === by ? (view.down ? "ascending" : "descending") : null },
        el("button", { type: "button", class: "plain sort", onclick: () => {
          if (view.by === by) view.down = !view.down;
          else Object.assign(view, { by, down: by !== "change" });
          view.page = 0;
          refresh();
        } }, label, view.by === by ? (view.down ? " ▲" : " ▼") : ""))));
      body.replaceChildren(...found.slice(view.page * PAGE, (view.page + 1) * PAGE).map((row) => el("tr", {},
        el("td", {}, el("button", { type: "button", class: "plain link", title: "show its rollouts", onclick: () => showTask(row.task) }, row.task)),
        row.cells.map((c, i) => el("td", { class: "num" }, !c ? "–" : el("span", {},
          el("span", { class: "tally" }, c[1] ? `${c[2]}/${c[1]}` : "unscored", c[0] > c[1] && c[1] ? el("span", { class: "note" }, ` +${c[0] - c[1]} unscored`) : null),
          c[1] ? meter(row.rates[i]) : null,
          el("span", { class: "note mean", title: "mean reward" }, c[1] && c[3] !== null && c[3] !== row.rates[i] ? num(c[3], 2) : "")))),
        compared ? el("td", { class: "num " + (row.change > 0 ? "up" : row.change < 0 ? "down" : "") }, row.change === null ? "–" : points(row.change)) : null)));
      count.textContent = `${counted(found.length, "task")}, page ${view.page + 1} of ${pages}`;
      previous.disabled = view.page === 0;
      next.disabled = view.page >= pages - 1;
    }
    previous.addEventListener("click", () => { view.page -= 1; refresh(); });
    next.addEventListener("click", () => { view.page += 1; refresh(); });
    const labels = { solved: "always solved", sometimes: "sometimes solved", never: "never solved", unscored: "with unscored attempts",
      better: "better than before", worse: "worse than before", same: "as before" };
    if (view.show && !taskRows.some(shows[view.show])) view.show = "";
    const options = Object.keys(labels).filter((k) => taskRows.some(shows[k]) && (compared || !["better", "worse", "same"].includes(k)));
    const bar = el("div", { class: "bar" },
      el("select", { id: "task-show", "aria-label": "which tasks", onchange: (e) => { view.show = e.target.value; view.page = 0; refresh(); } },
        el("option", { value: "" }, "all tasks"), options.map((k) => el("option", { value: k, selected: view.show === k }, labels[k]))),
      el("input", { type: "search", id: "task-query", placeholder: "search tasks", "aria-label": "search tasks", value: view.query,
        oninput: (e) => { view.query = e.target.value; view.page = 0; refresh(); } }));
    refresh();
    return [el("h2", { id: "tasks" }, "Tasks", el("small", {}, "solved of scored attempts; held-out ones")), bar,
      el("div", { class: "scroll" }, el("table", { class: "tasks", id: "task-table" }, el("thead", {}, head), body)),
      el("div", { class: "pager below" }, previous, count, next)];
  }
  function meter(rate) {
    return svg("svg", { class: "meter", width: 44, height: 8, "aria-hidden": "true" }, svg("rect", { class: "rail", width: 44, height: 8, rx: 2 }),
      svg("rect", { width: 44 * rate, height: 8, rx: 2, fill: "var(--good)" }));
  }
  function showTask(task) {
    Object.assign(state.browser, { run: "", step: "", split: "", reward: "", kind: "", query: "", task, page: 0, current: "" });
    again();
    document.getElementById("browser").scrollIntoView();
  }

  // --- rollouts ----------------------------------------------------------------------------

  function scoreBadge(r) {
    if (r.reward === null) return el("span", { class: "badge" }, "unscored");
    return el("span", { class: "badge " + (r.solved ? "good" : r.reward > 0 ? "warn" : "bad") }, num(r.reward, 3));
  }
  const kindsOf = (r) => r.kinds || [...new Set(r.feedback.flat().map((s) => s.kind))];
  function haystack(r) {
    if (!r.hay) {
      r.hay = [r.task, r.failure, ...(r.bare ? [] : [r.teacher, ...r.messages.flatMap((m) => [m.content, m.reasoning || "",
        ...(m.calls || []).flatMap((c) => [c.name, c.arguments]), ...(m.invalid || []).map((c) => c.text)]),
      ...r.feedback.flat().map((s) => s.text)])].join("\n").toLowerCase();
    }
    return r.hay;
  }

  // Offsets count Unicode characters, as Python does; JavaScript strings count UTF-16 units.
  function marked(text, segments, invalid) {
    const chars = Array.from(text);
    const spans = segments.map((s, i) => ({ n: i + 1, span: s.span })).concat(invalid.map((call) => ({ n: "!", span: call.span })))
      .filter((s) => s.span && s.span[0] < s.span[1] && s.span[0] < chars.length);
    const cuts = [...new Set([0, chars.length, ...spans.flatMap((s) => s.span.map((c) => Math.min(c, chars.length)))])]
      .sort((a, b) => a - b);
    return cuts.slice(0, -1).map((from, i) => {
      const piece = chars.slice(from, cuts[i + 1]).join("");
      const over = spans.filter((s) => s.span[0] <= from && from < s.span[1]);
      if (!over.length) return piece;
      const first = over.filter((s) => s.span[0] === from).map((s) => s.n).join(",");
      return el("mark", { class: over.every((s) => s.n === "!") ? "unread" : null, "data-n": first || null, "data-for": over.map((s) => s.n).join(" ") }, piece);
    });
  }

  function segmentView(s, i, body) {
    const tone = s.severity === "error" ? "bad" : s.severity === "warning" ? "warn" : "info";
    const light = (on) => body && body.querySelectorAll("mark").forEach((m) => {
      if (m.dataset.for.split(" ").includes(String(i + 1))) m.classList.toggle("lit", on);
    });
    return el("div", { class: "segment", onmouseenter: () => light(true), onmouseleave: () => light(false) },
      el("div", { class: "meta" },
        s.span ? el("sup", { class: "num-ref", "data-n": i + 1 }, String(i + 1)) : null,
        el("span", { class: "badge kind " + tone, "data-kind": s.kind }, s.kind),
        el("span", {}, s.source),
        s.reveals && s.reveals !== "nothing" ? el("span", { class: "badge" }, `reveals ${s.reveals}`) : null,
        s.untrusted ? el("span", { class: "badge" }, "untrusted text") : null,
        s.span ? el("span", {}, `characters ${s.span[0]}–${s.span[1]}`) : null),
      el("div", { class: "said" }, s.text));
  }

  // What a level shows of a step's feedback: segments as they are, by position, or reduced ones.
  const LEVELS = ["none", "binary", "category", "located", "explained", "expected", "reference"];
  function levelsOf(r) {
    const recorded = LEVELS.indexOf(sources[r.run].facts.feedback);
    return LEVELS.slice(0, recorded < 0 ? LEVELS.length : recorded + 1);
  }
  function levelNow(r) {
    const open = levelsOf(r);
    return open.includes(state.level) ? state.level : open[open.length - 1];
  }
  function atLevel(r, turn) {
    const step = r.feedback[turn] || [], reduced = (r.levels[turn] || {})[levelNow(r)];
    return reduced ? reduced.map((s) => (typeof s === "number" ? step[s] : s)) : step;
  }
  function levelPicker(r, redrawDetail) {
    const now = levelNow(r), open = levelsOf(r);
    return el("span", { class: "levels", role: "group", "aria-label": "feedback level" }, open.map((level) => el("button", { type: "button", "data-level": level,
      "aria-pressed": String(level === now), title: level === open[open.length - 1] ? "as it was shown" : "what this level would have shown",
      onclick: () => { state.level = level; redrawDetail(); } }, level)));
  }

  // The top of the colour scale is the 99th percentile of the run, so that rollouts compare.
  function topOf(source) {
    const all = source.rollouts.filter((r) => !r.bare).flatMap((r) => r.kl.filter((k) => k !== null).map(Math.abs)).sort((a, b) => a - b);
    return all.length ? all[Math.min(all.length - 1, Math.floor(all.length * 0.99))] || all[all.length - 1] || 1 : 1;
  }
  function heatColor(value, top) {
    const strength = Math.sqrt(Math.min(1, Math.abs(value) / top));
    return `rgba(var(--${value < 0 ? "cold" : "heat"}), ${(strength * 0.85).toFixed(3)})`;
  }

  function heatmap(r) {
    const top = tops[r.run];
    const values = r.kl.filter((k) => k !== null);
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    const peak = values.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), 0);
    const body = el("div", { class: "heat" }, r.tokens.map((token, i) => {
      const value = i < r.kl.length ? r.kl[i] : null;
      const env = r.mask && r.mask[i] === "0";
      const shown = token === "" ? "∅" : token.replace(/\n/g, "↵\n");
      const node = el("span", { "data-i": i, class: env ? "env" : value === null ? "off" : null }, shown);
      if (value !== null) node.style.backgroundColor = heatColor(value, top);
      return node;
    }));
    body.addEventListener("mousemove", (event) => {
      const at = event.target.dataset && event.target.dataset.i;
      if (at === undefined) return hideTip();
      const i = Number(at), value = i < r.kl.length ? r.kl[i] : null;
      showTip(event, el("b", {}, JSON.stringify(r.tokens[i])),
        el("div", {}, `token ${i + 1} of ${r.tokens.length + r.cut_tokens}`,
          el("b", {}, value !== null ? num(value) + " nats"
            : r.mask && r.mask[i] === "0" ? "from the environment" : "not distilled")));
      return undefined;
    });
    body.addEventListener("mouseleave", hideTip);
    const ramp = (sign) => el("span", { class: "ramp" }, Array.from({ length: 24 }, (_, i) => {
      const cell = el("i", {});
      cell.style.backgroundColor = heatColor(sign * top * ((sign < 0 ? 24 - i : i + 1) / 24), top);
      return cell;
    }));
    const negative = values.some((v) => v < 0);
    return el("div", { class: "block", id: "heatmap" },
      el("div", { class: "label" }, el("b", {}, "Teacher–student KL per token"),
        el("span", {}, `mean ${num(mean)}, peak ${num(peak)} nats`)),
      body,
      el("div", { class: "scale" },
        negative ? [`≤ −${num(top, 3)}`, ramp(-1)] : null, "0", ramp(1), `≥ ${num(top, 3)} nats`,
        el("span", {}, "(99th percentile of the run's tokens; square-root scale; grey: not distilled)"),
        r.cut_tokens ? el("span", {}, `${r.cut_tokens} more tokens are not on this page`) : null));
  }

  function folded(id, label, ...content) {
    return el("details", { class: "fold", id }, el("summary", {}, label), content);
  }
  function callView(call) {
    return el("div", { class: "call" }, el("div", { class: "meta" }, el("span", { class: "badge info" }, "call"), el("b", {}, call.name),
      call.id ? el("span", { class: "note" }, call.id) : null), el("div", { class: "said" }, call.arguments));
  }
  function invalidView(call) {
    return el("div", { class: "call invalid" }, el("div", { class: "meta" }, el("span", { class: "badge bad" }, "call that could not be read"),
      el("b", {}, call.status), call.why), el("div", { class: "said" }, call.text));
  }
  // The card is markup of the environment's author, around text of others: it may do nothing but be seen.
  function cardView(card) {
    const before = '<!doctype html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
      + 'style-src \'unsafe-inline\'; img-src data:"><style>body{margin:12px;font:14px/1.5 system-ui,sans-serif;color:#1b1f27;background:#fff}<\/style>';
    return el("div", { class: "block", id: "card" }, el("div", { class: "label" }, "the environment's card"),
      el("iframe", { sandbox: "", srcdoc: before + card, title: "the environment's card", loading: "lazy", referrerpolicy: "no-referrer" }));
  }

  function detail(r, select) {
    const source = sources[r.run], ofRun = source.kind === "run";
    const siblings = rollouts.filter((o) => o.run === r.run && o.step === r.step && o.split === r.split && o.group === r.group);
    const facts = [many ? source.name : null, ofRun ? `step ${r.step}` : null, ofRun ? r.split : null, counted(r.length, "token"), r.finish,
      ...Object.entries(r.metrics).map(([k, v]) => `${k} ${num(v)}`)].filter(Boolean);
    const nodes = [
      el("div", { class: "head" }, el("h3", {}, r.task), scoreBadge(r), r.solved ? el("span", { class: "badge good" }, "solved") : null,
        el("span", { class: "note" }, facts.join(" · "))),
    ];
    const others = many ? rollouts.filter((o) => o.run !== r.run && o.task === r.task && o.sample === r.sample && o.split !== "train").slice(0, 8) : [];
    if (siblings.length > 1) {
      nodes.push(el("div", { class: "siblings" }, "samples of this task:", siblings.map((o) =>
        el("button", { type: "button", "aria-current": o === r ? "true" : null, onclick: () => select(o) },
          o.reward === null ? "unscored" : num(o.reward, 3)))));
    }
    if (others.length && !ofRun) {
      nodes.push(el("div", { class: "siblings" }, "the same task in:", others.map((o) => el("button", { type: "button", onclick: () => select(o) },
        `${sources[o.run].name}${sources[o.run].kind === "run" ? `, step ${o.step}` : ""}: ${o.reward === null ? "unscored" : num(o.reward, 3)}`))));
    }
    if (r.failure) {
      nodes.push(el("div", { class: "block" }, el("div", { class: "label" }, el("span", { class: "badge warn" }, "unscored"),
        "the infrastructure failed; this is no reward"), el("div", { class: "text" }, r.failure)));
    }
    if (r.bare) {
      nodes.push(el("p", { class: "empty" }, `Its texts are not on this page, which would be too large; they are in the file. Feedback: ${r.kinds.join(", ") || "none"}.`));
      return nodes;
    }
    if (r.card) nodes.push(cardView(r.card));
    const replies = r.messages.map((m, i) => i).filter((i) => r.messages[i].role === "assistant");
    const own = replies.slice(Math.max(0, replies.length - Math.max(r.feedback.length, r.failure ? 1 : 0)));
    r.messages.forEach((m, i) => {
      const turn = own.indexOf(i);
      const segments = turn >= 0 ? atLevel(r, turn) : [];
      const body = el("div", { class: "text" }, marked(m.content, segments, m.invalid || []));
      const silent = m.content === "" && (m.calls || m.invalid);
      nodes.push(el("div", { class: "block" + (turn >= 0 ? " policy" : ""), "data-role": m.role },
        el("div", { class: "label" }, turn >= 0 ? (own.length > 1 ? `completion ${turn + 1}` : "completion") : m.role,
          m.answers ? el("span", { class: "note" }, `answers ${m.answers}`) : null),
        m.reasoning ? folded(`reasoning-${i}`, `reasoning (${counted(Array.from(m.reasoning).length, "character")})`, el("div", { class: "text" }, m.reasoning)) : null,
        silent ? null : body, (m.calls || []).map(callView), (m.invalid || []).map(invalidView)));
      if (turn >= 0 && (r.feedback[turn] || []).length) {
        nodes.push(el("div", { class: "block feedback" },
          el("div", { class: "label" }, "feedback", el("span", { class: "spring" }), levelPicker(r, () => select(r))),
          segments.length ? segments.map((s, n) => segmentView(s, n, body)) : el("div", { class: "segment note" }, "(this level shows nothing)")));
      }
    });
    if (r.tokens.length && r.kl.some((k) => k !== null)) nodes.push(heatmap(r));
    if (r.teacher) {
      nodes.push(el("details", { class: "block", id: "teacher" }, el("summary", {}, "teacher prompt (what the self-teacher saw)"),
        el("div", { class: "text" }, r.teacher)));
    }
    return nodes;
  }

  function browser() {
    const total = sources.reduce((sum, source) => sum + source.total_rollouts, 0);
    const bare = rollouts.filter((r) => r.bare).length;
    const title = el("h2", { id: "browser" }, "Rollouts", el("small", { id: "shown" }, (rollouts.length < total
      ? `a sample: ${rollouts.length} of ${total}, whole groups, first and last steps first`
      : `all ${total}`) + (bare ? `; ${bare} without their texts, for want of room` : "")));
    if (!rollouts.length) return [title, el("p", { class: "empty" }, "No rollouts were logged.")];
    const PAGE = 12;
    const view = state.browser;
    let current = rollouts.find((r) => r.key === view.current) || null;
    const rows = el("div", { class: "rows" }), pane = el("article", { class: "detail", id: "detail" });
    const count = el("span", {}), previous = el("button", { type: "button" }, "‹"), next = el("button", { type: "button" }, "›");
    const tests = {
      "": () => true, solved: (r) => r.solved, "not solved": (r) => r.reward !== null && !r.solved,
      partial: (r) => r.reward !== null && !r.solved && r.reward > 0, unscored: (r) => r.reward === null,
      "cut off": (r) => r.finish === "length",
    };
    const matching = () => rollouts.filter((r) => (view.run === "" || r.run === Number(view.run)) && (view.task === "" || r.task === view.task)
      && (view.step === "" || r.step === Number(view.step)) && (view.split === "" || r.split === view.split)
      && tests[view.reward](r) && (view.kind === "" || (view.kind === "(no feedback)" ? !kindsOf(r).length
        : kindsOf(r).includes(view.kind)))
      && (view.query === "" || haystack(r).includes(view.query.toLowerCase())));

    function select(r) {
      current = r;
      view.current = r.key;
      const open = new Set([...pane.querySelectorAll("details[open]")].map((node) => node.id));
      pane.replaceChildren(...detail(r, select).filter(Boolean));
      pane.querySelectorAll("details").forEach((node) => { node.open = open.has(node.id); });
      rows.querySelectorAll(".row").forEach((node) => node.setAttribute("aria-current", String(node.dataset.key === r.key)));
    }
    function refresh() {
      const found = matching(), pages = Math.max(1, Math.ceil(found.length / PAGE));
      view.page = Math.min(view.page, pages - 1);
      const shown = found.slice(view.page * PAGE, (view.page + 1) * PAGE);
      const where = (r) => [many ? sources[r.run].name : "", sources[r.run].kind === "run" ? `step ${r.step} · ${r.split}` : "",
        kindsOf(r).join(", ") || "no feedback"].filter(Boolean).join(" · ");
      rows.replaceChildren(...shown.map((r) => el("button", { class: "row", type: "button", "data-key": r.key,
        onclick: () => select(r) },
        el("span", { class: "name" }, r.task), el("span", { class: "score" }, scoreBadge(r)),
        el("span", { class: "where" }, where(r)))));
      count.textContent = `${counted(found.length, "rollout")}, page ${view.page + 1} of ${pages}`;
      previous.disabled = view.page === 0;
      next.disabled = view.page >= pages - 1;
      if (!found.length) pane.replaceChildren(el("p", { class: "empty" }, "No rollout matches these filters."));
      else select(found.includes(current) && shown.includes(current) ? current : shown[0]);
    }
    previous.addEventListener("click", () => { view.page -= 1; refresh(); });
    next.addEventListener("click", () => { view.page += 1; refresh(); });
    const pick = (name, label, values) => values.length < 2 ? null : el("select", { "aria-label": label, id: "filter-" + name,
      onchange: (e) => { view[name] = e.target.value; view.page = 0; refresh(); } },
      el("option", { value: "" }, label), values.map(([value, text]) => el("option", { value, selected: String(value) === view[name] }, text)));
    const distinct = (f, of = rollouts) => [...new Set(of.map(f))];
    const ofRuns = rollouts.filter((r) => sources[r.run].kind === "run");
    const kinds = [...new Set(rollouts.flatMap(kindsOf))].sort();
    const chip = view.task === "" ? null : el("button", { type: "button", class: "chip", onclick: () => { view.task = ""; view.page = 0; again(); } },
      `task ${view.task} ✕`);
    const bar = el("div", { class: "bar" }, chip,
      pick("run", runs.length === sources.length ? "all runs" : "all sources", sources.map((source, r) => [r, source.name])),
      pick("step", "all steps", distinct((r) => r.step, ofRuns).sort((a, b) => a - b).map((s) => [s, `step ${s}`])),
      pick("split", "train and eval", distinct((r) => r.split, ofRuns).map((s) => [s, s])),
      pick("reward", "any reward", Object.keys(tests).filter((t) => t && rollouts.some(tests[t])).map((t) => [t, t])),
      pick("kind", "any feedback", kinds.concat("(no feedback)").map((k) => [k, k])),
      el("input", { type: "search", placeholder: "search the texts", "aria-label": "search the texts", id: "filter-query", value: view.query,
        oninput: (e) => { view.query = e.target.value; view.page = 0; refresh(); } }));
    // Open on what there is most to see of: a distilled attempt with a blamed span.
    if (!current && view.task === "") {
      const best = [(r) => !r.bare && r.kl.length && r.feedback.flat().some((s) => s.span), (r) => !r.bare && r.kl.length,
        (r) => !r.bare && r.feedback.flat().some((s) => s.span), (r) => !r.bare && r.feedback.flat().length]
        .map((wanted) => rollouts.findIndex(wanted)).find((i) => i >= 0) || 0;
      view.page = Math.floor(best / PAGE);
      current = rollouts[best];
    } else if (current) { // new data may have moved it to another page
      const at = matching().indexOf(current);
      if (at >= 0) view.page = Math.floor(at / PAGE);
    }
    refresh();
    return [title, bar, el("div", { class: "browser", id: "rollouts" },
      el("nav", { class: "list", "aria-label": "rollouts" }, rows,
        el("div", { class: "pager" }, previous, count, next)), pane)];
  }

  // --- configuration, events ---------------------------------------------------------------

  function configuration() {
    const part = (name) => {
      const keys = [...new Set(sources.flatMap((source) => Object.keys(source[name])))].sort();
      return keys.map((key) => {
        const values = sources.map((source) => source[name][key]);
        return el("tr", { class: values.some((v) => v !== values[0]) ? "differs" : null }, el("td", { class: "key" }, key),
          values.map((v) => el("td", { class: "val" }, v === undefined ? "–" : v)));
      });
    };
    const table = (name) => el("div", { class: "scroll" }, el("table", { id: name },
      many ? el("thead", {}, el("tr", {}, el("th", {}, "key"), sources.map((source) => el("th", {}, source.name)))) : null,
      el("tbody", {}, part(name))));
    return [
      el("h2", {}, "Configuration", many ? el("small", {}, "shaded: they differ") : null), table("config"),
      el("details", { class: "more", id: "versions" }, el("summary", {}, "versions and platform"), table("lock")),
    ];
  }

  function events() {
    if (!runs.length) return [];
    const all = runs.flatMap((run) => run.events.map((event) => ({ ...event, run: run.name })));
    const tone = { warning: "warn", error: "bad" };
    return [
      el("h2", {}, "Warnings and events", el("small", {}, all.length ? String(all.length) : null)),
      all.length ? el("div", { class: "scroll" }, el("table", { class: "events", id: "events" }, el("tbody", {}, all.map((e) => el("tr", {},
        el("td", { class: "key" }, String(e.time || "").replace("T", " ").replace("+00:00", " UTC")), many ? el("td", {}, e.run) : null,
        el("td", {}, el("span", { class: "badge " + (tone[e.level] || "info") }, e.level)), el("td", {}, e.message))))))
        : el("p", { class: "empty" }, "None."),
    ];
  }

  // --- the page ----------------------------------------------------------------------------

  if (!root.dataset.theme) {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    root.dataset.theme = dark.matches ? "dark" : "light";
    dark.addEventListener("change", (e) => { root.dataset.theme = e.matches ? "dark" : "light"; });
  }

  function load(fresh) {
    data = fresh;
    sources = data.sources;
    runs = sources.filter((source) => source.kind === "run");
    many = sources.length > 1;
    const seen = new Map();
    rollouts = sources.flatMap((source, run) => source.rollouts.map((r) => {
      const own = [run, r.step, r.split, r.group, r.sample].join("|"), n = seen.get(own) || 0;
      seen.set(own, n + 1); // records of old runs do not say which sample they are
      return Object.assign(r, { run, key: `${own}|${n}` });
    }));
    tops = sources.map(topOf);
    again();
  }

  // Draw everything anew; what the reader has chosen, opened and scrolled to stays.
  function again() {
    const active = document.activeElement, held = active && active.id && page.contains(active) ? active : null;
    const caret = held && held.nodeName === "INPUT" ? held.selectionStart : null;
    const open = [...page.querySelectorAll("details[id]")].filter((node) => node.open).map((node) => node.id);
    const [x, y] = [scrollX, scrollY];
    redraws.length = 0;
    hideTip();
    const parts = [header(), curves(), comparison(), tasks(), browser(), configuration(), events(),
      el("footer", {}, `Written by rlrf ${data.version}, ${data.written}.`)];
    page.replaceChildren(...parts.flat(Infinity).filter(Boolean));
    for (const id of open) {
      const node = document.getElementById(id);
      if (node) node.open = true;
    }
    redraw();
    scrollTo(x, y);
    if (held) {
      const node = document.getElementById(held.id);
      if (node) node.focus({ preventScroll: true });
      if (node && caret !== null) node.setSelectionRange(caret, caret);
    }
  }

  load(JSON.parse(document.getElementById("data").textContent));
  document.addEventListener("rlrf-data", (event) => load(event.detail));
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(redraw, 80); });
  root.dataset.ready = "1";
})();
