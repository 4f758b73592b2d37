"use strict";
// Everything a rollout says is hostile text: it is only ever set as text, never as markup.
(() => {
  const root = document.documentElement;
  window.addEventListener("error", (e) => { root.dataset.error = String(e.message); });
  const data = JSON.parse(document.getElementById("data").textContent);
  const page = document.getElementById("page");
  const tip = document.getElementById("tip");
  const SVG = "http://www.w3.org/2000/svg";
  const DASH = ["", "6 3", "2 2", "9 3 2 3", "12 4", "4 2 1 2 1 2"];
  const many = data.runs.length > 1;

  // --- small tools -------------------------------------------------------------------------

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat(Infinity)) {
      if (child !== null && child !== undefined && child !== false) node.append(child);
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

  let smoothing = 0;
  const redraws = [];

  // Of several runs the colour is told once, above the charts; here only what the dashes mean.
  function legend(series, options) {
    const entries = !many || options.tall ? series.map((s) => [s.label, s.color, s.dash])
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
    data.runs.forEach((run, r) => metrics.forEach(([name, label], m) => {
      const points = run.series[name];
      if (!points) return;
      const several = metrics.length > 1;
      found.push({
        label: many ? (several ? `${run.name}: ${label}` : run.name) : label,
        color: many ? color(r) : color(m), dash: many && several ? m % DASH.length : 0, points, metric: label,
        shift: many ? (r - (data.runs.length - 1) / 2) * 5 : 0, ...(typeof extra === "function" ? extra(run) : extra),
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
    const rates = { percent: true, min: 0, max: 1 };
    ["eval/pass_rate", "completions/min_length", "completions/max_length", "step"].forEach((n) => used.add(n));
    const main = [
      plot("Training reward", "mean over the rollouts of a step", [["reward", "reward"]], { tall: true, min: 0, always: true }),
      plot("Held-out pass rate", "bars: 95 % confidence interval over tasks and samples", [["eval/pass_rate", "pass rate"]],
        { ...rates, tall: true, always: true }, (run) => ({ ci: run.ci, dots: true, fixed: true })),
    ];
    const band = (run) => {
      if (many) return {}; // bands of several runs would be one grey blur
      const low = run.series["completions/min_length"], high = new Map(run.series["completions/max_length"] || []);
      return { band: (low || []).filter(([x, y]) => y !== null && high.get(x) != null).map(([x, y]) => [x, y, high.get(x)]) };
    };
    const kinds = [...new Set(data.runs.flatMap((run) => Object.keys(run.kinds)))];
    const kindLines = data.runs.flatMap((run, r) => kinds.filter((k) => run.kinds[k]).map((k) => ({
      label: many ? `${run.name}: ${k}` : k, color: many ? color(r) : color(kinds.indexOf(k)),
      dash: many ? kinds.indexOf(k) % DASH.length : Math.floor(kinds.indexOf(k) / 8) % DASH.length, points: run.kinds[k],
      metric: k,
    })));
    const small = [
      plot("Loss", "as minimised", [["loss", "loss"]]),
      plot("Teacher–student divergence", "mean over distilled tokens, nats", [[SD + "teacher_student_kl", "KL"]], { min: 0 }),
      plot("Entropy", "of the sampled tokens, nats", [["entropy", "entropy"]], { min: 0 }),
      plot("Completion length", many ? "mean tokens" : "mean tokens; band: shortest to longest", [["completions/mean_length", "mean length"]], { min: 0 }, band),
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
    const rest = [...new Set(data.runs.flatMap((run) => Object.keys(run.series)))].filter((n) => !used.has(n)).sort();
    const others = rest.map((name) => plot(name, "", [[name, name]]));
    const shown = main.concat(small, others).filter(Boolean);
    if (!shown.length) return [el("h2", {}, "Curves"), el("p", { class: "empty" }, "No step has been logged yet.")];
    if (data.runs.some((run) => (run.series.reward || []).length > 40)) smoothing = 0.6;
    const smooth = el("select", { onchange: (e) => { smoothing = Number(e.target.value); redraw(); } },
      [["none", 0], ["light", 0.6], ["strong", 0.9]].map(([label, value]) => el("option", { value, selected: value === smoothing }, label)));
    const key = many ? el("div", { class: "legend" }, data.runs.map((run, r) => el("span", {}, swatch(color(r)), run.name))) : null;
    const nodes = [
      el("h2", {}, "Curves", el("small", {}, "over training steps"
        + (data.runs.some((run) => run.thinned) ? "; long curves are thinned" : "")), el("span", { class: "spring" }),
        el("span", { class: "bar" }, el("label", {}, "smoothing", smooth))), key,
      el("div", { class: "charts main" }, main), el("div", { class: "charts" }, small),
    ];
    if (others.some(Boolean)) {
      const more = el("details", { class: "more", ontoggle: () => redraw() },
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

  function header() {
    const title = many ? `${data.runs.length} runs` : data.runs[0].name;
    const theme = el("button", { class: "plain", type: "button", "aria-label": "switch light and dark",
      onclick: () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; } }, "◐ theme");
    const columns = [
      ["Run", (run, r) => el("td", {}, swatch(color(r)), run.name)],
      ["Status", (run) => el("td", {}, el("span", { class: "badge " + (STATUS[run.facts.status] || "") }, run.facts.status))],
      ["Trainer", (run) => run.facts.trainer],
      ["Environment", (run) => run.facts.env + (run.facts.feedback ? ` (${run.facts.feedback})` : "")],
      ["Model", (run) => run.facts.model.split("/").slice(-2).join("/")],
      ["Steps", (run) => run.facts.steps, true],
      ["Duration", (run) => duration(seconds(run.facts.started, run.facts.finished)), true],
      ["Training reward", (run) => change(ends(run.series.reward), (v) => num(v, 3)), true],
      ["Held-out pass rate", (run) => change(ends(run.series["eval/pass_rate"]), percent), true],
      ["95 % CI at the end", (run) => {
        const last = run.ci[run.ci.length - 1];
        return last ? `${percent(last[1])} – ${percent(last[2])}` : "–";
      }, true],
    ].filter(([, value]) => data.runs.some((run, r) => value(run, r) !== "" && value(run, r) !== "–"));
    const rows = data.runs.map((run, r) => el("tr", {}, columns.map(([, value, right]) => {
      const shown = value(run, r);
      return shown instanceof Node ? shown : el("td", { class: right ? "num" : null }, shown === "" ? "–" : String(shown));
    })));
    const messages = data.runs.filter((run) => run.facts.message)
      .map((run) => el("p", {}, el("span", { class: "badge bad" }, run.facts.status), ` ${run.name}: ${run.facts.message}`));
    return [
      el("div", { class: "top" },
        el("div", {}, el("div", { class: "kicker" }, "rlrf training report"), el("h1", {}, title)), theme),
      el("div", { class: "scroll runs" }, el("table", { id: "runs" },
        el("thead", {}, el("tr", {}, columns.map(([name, , right]) => el("th", { class: right ? "num" : null }, name)))),
        el("tbody", {}, rows))), messages,
    ];
  }

  // --- rollouts ----------------------------------------------------------------------------

  const rollouts = data.runs.flatMap((run, r) => run.rollouts.map((rollout) => Object.assign(rollout, { run: r })));

  function scoreBadge(r) {
    if (r.reward === null) return el("span", { class: "badge" }, "unscored");
    return el("span", { class: "badge " + (r.solved ? "good" : r.reward > 0 ? "warn" : "bad") }, num(r.reward, 3));
  }
  const kindsOf = (r) => [...new Set(r.feedback.flat().map((s) => s.kind))];
  function haystack(r) {
    if (!r.hay) {
      r.hay = [r.task, r.failure, r.teacher, ...r.messages.map((m) => m.content),
        ...r.feedback.flat().map((s) => s.text)].join("\n").toLowerCase();
    }
    return r.hay;
  }

  // Offsets count Unicode characters, as Python does; JavaScript strings count UTF-16 units.
  function marked(text, segments) {
    const chars = Array.from(text);
    const spans = segments.map((s, i) => ({ n: i + 1, span: s.span }))
      .filter((s) => s.span && s.span[0] < s.span[1] && s.span[0] < chars.length);
    const cuts = [...new Set([0, chars.length, ...spans.flatMap((s) => s.span.map((c) => Math.min(c, chars.length)))])]
      .sort((a, b) => a - b);
    return cuts.slice(0, -1).map((from, i) => {
      const piece = chars.slice(from, cuts[i + 1]).join("");
      const over = spans.filter((s) => s.span[0] <= from && from < s.span[1]);
      if (!over.length) return piece;
      const first = over.filter((s) => s.span[0] === from).map((s) => s.n).join(",");
      return el("mark", { "data-n": first || null, "data-for": over.map((s) => s.n).join(" ") }, piece);
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

  // The top of the colour scale is the 99th percentile of the run, so that rollouts compare.
  const tops = data.runs.map((run) => {
    const all = run.rollouts.flatMap((r) => r.kl.filter((k) => k !== null).map(Math.abs)).sort((a, b) => a - b);
    return all.length ? all[Math.min(all.length - 1, Math.floor(all.length * 0.99))] || all[all.length - 1] || 1 : 1;
  });
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

  function detail(r, select) {
    const siblings = rollouts.filter((o) => o.run === r.run && o.step === r.step && o.split === r.split && o.group === r.group);
    const facts = [many ? data.runs[r.run].name : null, `step ${r.step}`, r.split, `${r.length} tokens`, r.finish,
      ...Object.entries(r.metrics).map(([k, v]) => `${k} ${num(v)}`)].filter(Boolean);
    const nodes = [
      el("div", { class: "head" }, el("h3", {}, r.task), scoreBadge(r), r.solved ? el("span", { class: "badge good" }, "solved") : null,
        el("span", { class: "note" }, facts.join(" · "))),
    ];
    if (siblings.length > 1) {
      nodes.push(el("div", { class: "siblings" }, "samples of this task:", siblings.map((o) =>
        el("button", { type: "button", "aria-current": o === r ? "true" : null, onclick: () => select(o) },
          o.reward === null ? "unscored" : num(o.reward, 3)))));
    }
    if (r.failure) {
      nodes.push(el("div", { class: "block" }, el("div", { class: "label" }, el("span", { class: "badge warn" }, "unscored"),
        "the infrastructure failed; this is no reward"), el("div", { class: "text" }, r.failure)));
    }
    const replies = r.messages.map((m, i) => i).filter((i) => r.messages[i].role === "assistant");
    const own = replies.slice(Math.max(0, replies.length - Math.max(r.feedback.length, r.failure ? 1 : 0)));
    r.messages.forEach((m, i) => {
      const turn = own.indexOf(i);
      const segments = turn >= 0 ? r.feedback[turn] || [] : [];
      const body = el("div", { class: "text" }, marked(m.content, segments));
      nodes.push(el("div", { class: "block" + (turn >= 0 ? " policy" : ""), "data-role": m.role },
        el("div", { class: "label" }, turn >= 0 ? (own.length > 1 ? `completion ${turn + 1}` : "completion") : m.role),
        m.reasoning ? el("div", { class: "text" }, m.reasoning) : null, body,
        m.calls ? el("div", { class: "text" }, m.calls) : null));
      if (segments.length) {
        nodes.push(el("div", { class: "block feedback" }, el("div", { class: "label" }, "feedback"),
          segments.map((s, n) => segmentView(s, n, body))));
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
    const total = data.runs.reduce((sum, run) => sum + run.total_rollouts, 0);
    const title = el("h2", {}, "Rollouts", el("small", { id: "shown" }, rollouts.length < total
      ? `a sample: ${rollouts.length} of ${total}, whole groups, first and last steps first`
      : `all ${total}`));
    if (!rollouts.length) return [title, el("p", { class: "empty" }, "No rollouts were logged.")];
    const PAGE = 12;
    const state = { run: "", step: "", split: "", reward: "", kind: "", query: "", page: 0, current: null };
    const rows = el("div", { class: "rows" }), pane = el("article", { class: "detail", id: "detail" });
    const count = el("span", {}), previous = el("button", { type: "button" }, "‹"), next = el("button", { type: "button" }, "›");
    const tests = {
      "": () => true, solved: (r) => r.solved, "not solved": (r) => r.reward !== null && !r.solved,
      partial: (r) => r.reward !== null && !r.solved && r.reward > 0, unscored: (r) => r.reward === null,
    };
    const matching = () => rollouts.filter((r) => (state.run === "" || r.run === Number(state.run))
      && (state.step === "" || r.step === Number(state.step)) && (state.split === "" || r.split === state.split)
      && tests[state.reward](r) && (state.kind === "" || (state.kind === "(no feedback)" ? !r.feedback.flat().length
        : kindsOf(r).includes(state.kind)))
      && (state.query === "" || haystack(r).includes(state.query)));

    function select(r) {
      state.current = r;
      pane.replaceChildren(...detail(r, select).filter(Boolean));
      rows.querySelectorAll(".row").forEach((node) => node.setAttribute("aria-current", String(rollouts[node.dataset.at] === r)));
    }
    function refresh() {
      const found = matching(), pages = Math.max(1, Math.ceil(found.length / PAGE));
      state.page = Math.min(state.page, pages - 1);
      const shown = found.slice(state.page * PAGE, (state.page + 1) * PAGE);
      rows.replaceChildren(...shown.map((r) => el("button", { class: "row", type: "button", "data-at": rollouts.indexOf(r),
        onclick: () => select(r) },
        el("span", { class: "name" }, r.task), el("span", { class: "score" }, scoreBadge(r)),
        el("span", { class: "where" }, `${many ? data.runs[r.run].name + " · " : ""}step ${r.step} · ${r.split} · ${kindsOf(r).join(", ") || "no feedback"}`))));
      count.textContent = `${found.length} rollouts, page ${state.page + 1} of ${pages}`;
      previous.disabled = state.page === 0;
      next.disabled = state.page >= pages - 1;
      if (!found.length) pane.replaceChildren(el("p", { class: "empty" }, "No rollout matches these filters."));
      else select(found.includes(state.current) && shown.includes(state.current) ? state.current : shown[0]);
    }
    previous.addEventListener("click", () => { state.page -= 1; refresh(); });
    next.addEventListener("click", () => { state.page += 1; refresh(); });
    const pick = (name, label, values) => values.length < 2 ? null : el("select", { "aria-label": label, id: "filter-" + name,
      onchange: (e) => { state[name] = e.target.value; state.page = 0; refresh(); } },
      el("option", { value: "" }, label), values.map(([value, text]) => el("option", { value }, text)));
    const distinct = (f) => [...new Set(rollouts.map(f))];
    const kinds = [...new Set(rollouts.flatMap(kindsOf))].sort();
    const bar = el("div", { class: "bar" },
      pick("run", "all runs", data.runs.map((run, r) => [r, run.name])),
      pick("step", "all steps", distinct((r) => r.step).sort((a, b) => a - b).map((s) => [s, `step ${s}`])),
      pick("split", "train and eval", distinct((r) => r.split).map((s) => [s, s])),
      pick("reward", "any reward", ["solved", "not solved", "partial", "unscored"].filter((t) => rollouts.some(tests[t])).map((t) => [t, t])),
      pick("kind", "any feedback", kinds.concat("(no feedback)").map((k) => [k, k])),
      el("input", { type: "search", placeholder: "search the texts", "aria-label": "search the texts", id: "filter-query",
        oninput: (e) => { state.query = e.target.value.toLowerCase(); state.page = 0; refresh(); } }));
    // Open on what there is most to see of: a distilled attempt with a blamed span.
    const best = [(r) => r.kl.length && r.feedback.flat().some((s) => s.span), (r) => r.kl.length, (r) => r.feedback.flat().length]
      .map((wanted) => rollouts.findIndex(wanted)).find((i) => i >= 0) || 0;
    state.page = Math.floor(best / PAGE);
    state.current = rollouts[best];
    refresh();
    return [title, bar, el("div", { class: "browser", id: "rollouts" },
      el("nav", { class: "list", "aria-label": "rollouts" }, rows,
        el("div", { class: "pager" }, previous, count, next)), pane)];
  }

  // --- configuration, events ---------------------------------------------------------------

  function configuration() {
    const part = (name) => {
      const keys = [...new Set(data.runs.flatMap((run) => Object.keys(run[name])))].sort();
      return keys.map((key) => {
        const values = data.runs.map((run) => run[name][key]);
        return el("tr", { class: values.some((v) => v !== values[0]) ? "differs" : null }, el("td", { class: "key" }, key),
          values.map((v) => el("td", { class: "val" }, v === undefined ? "–" : v)));
      });
    };
    const table = (name) => el("div", { class: "scroll" }, el("table", { id: name },
      many ? el("thead", {}, el("tr", {}, el("th", {}, "key"), data.runs.map((run) => el("th", {}, run.name)))) : null,
      el("tbody", {}, part(name))));
    return [
      el("h2", {}, "Configuration", many ? el("small", {}, "shaded: the runs differ") : null), table("config"),
      el("details", { class: "more" }, el("summary", {}, "versions and platform"), table("lock")),
    ];
  }

  function events() {
    const all = data.runs.flatMap((run) => run.events.map((event) => ({ ...event, run: run.name })));
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
  const parts = [header(), curves(), browser(), configuration(), events(),
    el("footer", {}, `Written by rlrf ${data.version}, ${data.written}.`)];
  page.replaceChildren(...parts.flat(Infinity).filter(Boolean));
  redraw();
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(redraw, 80); });
  root.dataset.ready = "1";
})();
