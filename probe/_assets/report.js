// Draws every figure in the light or dark template, whichever the page is in; always light on paper.
(function () {
  "use strict";
  var read = function (id) { return JSON.parse(document.getElementById(id).textContent); };
  var templates = read("templates");
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  var plots = Array.prototype.slice.call(document.querySelectorAll(".plot"));
  var narrow = function () { return window.innerWidth < 600; };

  // On a phone: smaller type, and colour bars under the map, where they take no width from it.
  function fitted(figure) {
    figure.layout.template = dark.matches ? templates.dark : templates.light;
    if (!narrow()) { return figure; }
    figure.layout.font = { size: 12 };
    figure.layout.margin = Object.assign({}, figure.layout.margin, { l: 36, r: 8 });
    figure.data.forEach(function (trace) {
      if (trace.type === "heatmap" && trace.colorbar) {
        Object.assign(trace.colorbar, { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0.5, xanchor: "center", len: 0.9 });
        delete trace.colorbar.title;  // the caption says what it is
        figure.layout.height += 70;
      }
    });
    return figure;
  }

  // A map of many columns keeps its labels apart and scrolls sideways where the page is too narrow for it.
  function needed(figure) {
    var columns = figure.data.map(function (trace) { return trace.type === "heatmap" ? trace.x.length : 0; });
    return 90 + 15 * Math.max.apply(null, columns.concat(0));
  }

  function draw(div) {
    var figure = fitted(read(div.id + "-data"));
    if (needed(figure) > div.clientWidth) { div.style.minWidth = needed(figure) + "px"; }
    div.style.minHeight = figure.layout.height + "px";
    var settings = { responsive: true, displaylogo: false, displayModeBar: narrow() ? false : "hover", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
    return window.Plotly.newPlot(div, figure.data, figure.layout, settings);
  }

  function relayout(template) {
    plots.forEach(function (div) { window.Plotly.relayout(div, { template: template }); });
  }

  plots.forEach(draw);
  dark.addEventListener("change", function () { relayout(dark.matches ? templates.dark : templates.light); });
  window.addEventListener("beforeprint", function () { relayout(templates.light); });
  window.addEventListener("afterprint", function () { relayout(dark.matches ? templates.dark : templates.light); });
  document.documentElement.setAttribute("data-plots", String(plots.length));
})();
