"use strict";
// Whatever comes from files goes through textContent, or through `plain` where Plotly reads a little HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const get = (id) => document.getElementById(id);
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const PALETTE = ["#3b78c3", "#d9742b", "#3f9b57", "#b8448b", "#8a6bbf", "#937048", "#2ba3a8", "#c74c4c", "#7d8793", "#a89a1f"];
const colour = (number) => PALETTE[(number - 1) % PALETTE.length];
const style = (name) => {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.color = `var(${name})`;
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
};

function make(tag, text = "", within = null) {
  const element = document.createElement(tag);
  element.textContent = text;
  return within ? within.appendChild(element) : element;
}

function name(within, number, text) {
  const swatch = make("span", "", within);
  swatch.className = "swatch";
  swatch.style.background = colour(number);
  within.append(text);
}

function showTable() {
  const head = make("tr", "", get("table"));
  make("th", "", head);
  for (const column of data.table) make("th", column.name, head);
  data.configurations.forEach((configuration, i) => {
    const row = make("tr", "", get("table"));
    name(make("td", "", row), configuration.configuration, configuration.configuration);
    for (const column of data.table) make("td", column.cells[i].text, row).className = column.cells[i].best ? "best" : "";
  });
  for (const note of data.notes) make("li", note, get("notes"));
}

function showRuns() {
  const head = make("tr", "", get("runs"));
  for (const word of ["configuration", "seed", "step", "run"]) make("th", word, head);
  for (const run of data.runs) {
    const row = make("tr", "", get("runs"));
    name(make("td", "", row), run.configuration, run.configuration);
    make("td", run.seed, row);
    make("td", run.complete ? run.step : `${run.step} of ${run.steps}`, row);
    make("td", run.run, row);
  }
}

function traces(metric, seeds) {
  const lines = [];
  for (const { configuration, label, n, curves } of data.configurations) {
    const group = { legendgroup: configuration, mode: "lines+markers", type: "scatter" };
    for (const run of data.runs.filter((run) => run.configuration === configuration && run.curves[metric])) {
      const curve = run.curves[metric];
      const alone = n === 1;
      if (!alone && !seeds) continue;
      lines.push({
        ...group, x: curve.seen, y: curve.value, customdata: curve.step, name: plain(label), showlegend: alone,
        line: { color: colour(configuration), width: alone ? 2.5 : 1 }, opacity: alone ? 1 : 0.5,
        marker: { size: alone ? 5 : 3 },
        hovertemplate: `%{y:.6g} at step %{customdata}<br>${plain(run.run)}<br>seed ${plain(run.seed)}<extra></extra>`,
      });
    }
    if (n > 1 && curves[metric]) {
      lines.push({
        ...group, x: curves[metric].seen, y: curves[metric].mean, name: plain(label),
        line: { color: colour(configuration), width: 3 }, marker: { size: 5 },
        hovertemplate: `%{y:.6g} at %{x} images<br>mean of ${plain(label)}<extra></extra>`,
      });
    }
  }
  return lines;
}

function layout(title, legend) {
  const axis = { gridcolor: style("--line"), zerolinecolor: style("--line"), automargin: true };
  return {
    title: { text: plain(title), font: { size: 14 } }, showlegend: legend, hovermode: "closest",
    legend: { orientation: "h", y: -0.18 }, margin: { t: 36, r: 16, b: 40, l: 56 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: style("--ink"), size: 12 },
    xaxis: { ...axis, title: { text: "images seen" } }, yaxis: axis,
  };
}

const options = { responsive: true, displaylogo: false };

function showCurve() {
  const metric = get("metric").value;
  Plotly.react("curve", traces(metric, get("seeds").checked), layout(metric, true), options);
}

function showCurves() {
  const metrics = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves)))];
  for (const metric of metrics) make("option", metric, get("metric")).value = metric;
  get("metric").value = ["eval/elbo", ...data.metrics, ...metrics].find((metric) => metrics.includes(metric)) ?? "";
  get("metric").onchange = get("seeds").onchange = showCurve;
  if (metrics.length) showCurve();
  for (const metric of data.metrics.slice(0, 12)) {
    const card = make("div", "", get("plots"));
    card.className = "card";
    Plotly.newPlot(card, traces(metric, true), layout(metric, false), { ...options, displayModeBar: false });
  }
}

// A hyper-parameter's values stand at equal distances, in their order: 1, 2, 4, 8 as well as words.
function dimension(key, runs) {
  const own = runs.map((run) => data.configurations[run.configuration - 1].differs[key] ?? "–");
  const values = [...new Set(own)].sort((a, b) => a - b || String(a).localeCompare(b));
  return { label: plain(key), values: own.map((value) => values.indexOf(value)), range: [0, values.length - 1 || 1],
    tickvals: values.map((_, i) => i), ticktext: values.map(plain) };
}

function showParallel() {
  const metrics = data.metrics.filter((metric) => data.runs.filter((run) => run.final[metric]).length > 1).slice(0, 8);
  const runs = data.runs.filter((run) => metrics.every((metric) => run.final[metric]));
  if (!data.telling.length || !metrics.length || runs.length < 2) return get("parallel").remove();
  const last = Math.max(data.configurations.length, 2);
  const scale = Array.from({ length: last }, (_, i) => [i / (last - 1), colour(i + 1)]);
  Plotly.newPlot("coordinates", [{
    type: "parcoords", labelangle: -12,
    line: { color: runs.map((run) => run.configuration), colorscale: scale, cmin: 1, cmax: last },
    dimensions: [
      ...data.telling.map((key) => dimension(key, runs)),
      ...metrics.map((metric) => ({ label: plain(metric), values: runs.map((run) => run.final[metric].mean) })),
    ],
  }], { ...layout("", false), margin: { t: 80, r: 80, b: 30, l: 80 } }, options);
}

function showPictures() {
  for (const { name: title, views } of data.pictures) {
    make("h2", title, get("pictures"));
    const bar = make("p", "", get("pictures"));
    const grid = make("div", "", get("pictures"));
    grid.className = "pictures";
    const show = (i) => {
      grid.replaceChildren();
      said.textContent = views[i].title;
      for (const { run, step, source } of views[i].pictures) {
        const figure = make("figure", "", grid);
        if (source) {
          const image = make("img", "", figure);
          image.src = source;
          image.alt = `${title} of ${data.runs[run].run}`;
          image.onclick = () => figure.classList.toggle("whole");
        }
        const { configuration, label } = { ...data.configurations[data.runs[run].configuration - 1] };
        const caption = make("figcaption", "", figure);
        name(caption, configuration, `${label}, seed ${data.runs[run].seed}, step ${step}${source ? "" : " (left out: too large)"}`);
        caption.title = data.runs[run].run;
      }
    };
    const slider = views.length > 1 ? make("input", "", bar) : null;
    const said = make("span", "", bar);
    if (slider) {
      Object.assign(slider, { type: "range", min: 0, max: views.length - 1, value: views.length - 1 });
      slider.oninput = () => show(+slider.value);
    }
    show(views.length - 1);
  }
}

get("about").textContent = data.about;
showTable();
showCurves();
showParallel();
showPictures();
showRuns();
