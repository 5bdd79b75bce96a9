(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d"],
    // Where nothing hovers, plotly would show its buttons for good, over the legends.
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
  };
  const drawn = figures.map((figure, number) =>
    Plotly.newPlot(`plot-${number}`, figure.data, figure.layout, config));
  Promise.all(drawn).then(() => { document.body.dataset.drawn = figures.length; });
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", () => {
      const code = button.parentElement.querySelector("code");
      const range = document.createRange();
      range.selectNodeContents(code);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
      button.textContent = "✓";
    });
  }
})();
