"use strict";
for (const place of document.querySelectorAll("[data-figure]")) {
  const figure = JSON.parse(document.getElementById(place.dataset.figure).textContent);
  Plotly.newPlot(place, figure.data, figure.layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: "hover",
    // Named one by one: others of plotly would ask the network.
    modeBarButtons: [["zoomIn2d", "zoomOut2d", "autoScale2d", "resetScale2d"], ["toImage"]],
  });
}
