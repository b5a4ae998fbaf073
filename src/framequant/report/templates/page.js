"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Colours of text, grid and background follow the page; everything else comes with the figure.
  const themed = (layout, width) => {
    const axis = (given) => ({
      gridcolor: colour("--grid"), linecolor: colour("--line"), zeroline: false, automargin: true,
      tickfont: { size: 11 }, exponentformat: "power", ...given,
      title: { standoff: 8, font: { size: 12 }, ...(given && given.title) },
    });
    return {
      ...layout, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
      margin: { l: 8, r: 10, t: 10, b: 8 },
      legend: { orientation: "h", x: 0, xanchor: "left", y: -0.16, yanchor: "top", yref: "paper", font: { size: 11 } },
      hoverlabel: { bgcolor: colour("--page"), bordercolor: colour("--line"), font: { color: colour("--ink") }, namelength: -1 },
      xaxis: axis(layout.xaxis), yaxis: axis({ ...(width < 500 ? { nticks: 6 } : {}), ...layout.yaxis }),
    };
  };
  const draw = (element) => {
    const figure = figures[element.dataset.figure];
    const columns = Math.max(1, Math.floor(element.clientWidth / 230));
    const named = figure.data.length > 1 ? figure.data.length : 0;
    element.style.height = `${370 + 20 * Math.ceil(named / columns)}px`;
    const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
    Plotly.newPlot(element, figure.data, themed(figure.layout, element.clientWidth), options).then(() => {
      element.dataset.drawn = "yes";
    });
  };
  const plots = [...document.querySelectorAll(".plot")];
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        watcher.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "800px" });
  plots.forEach((element) => watcher.observe(element));
  dark.addEventListener("change", () => {
    plots.filter((element) => element.dataset.drawn).forEach(draw);
  });

  // A column sorts by number if all of its cells are numbers or empty; empty cells stay last either way.
  const value = (row, index) => row.cells[index].dataset.key;
  const isNumeric = (rows, index) => {
    const filled = rows.map((row) => value(row, index)).filter((key) => key !== "");
    return filled.length > 0 && filled.every((key) => Number.isFinite(Number(key)));
  };
  const sort = (table, index) => {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const heading = table.tHead.rows[0].cells[index];
    const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const numeric = isNumeric(rows, index);
    rows.sort((one, two) => {
      const [a, b] = [value(one, index), value(two, index)];
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
    });
    for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    body.append(...rows);
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const rows = [...table.tBodies[0].rows];
    [...table.tHead.rows[0].cells].forEach((heading, index) => {
      heading.firstElementChild.addEventListener("click", () => sort(table, index));
      const cells = rows.map((row) => row.cells[index]);
      if (isNumeric(rows, index)) [heading, ...cells].forEach((cell) => cell.classList.add("number"));
      cells.filter((cell) => cell.textContent.length > 48).forEach((cell) => cell.classList.add("long"));
    });
  }
  for (const field of document.querySelectorAll(".filter")) {
    const rows = [...field.nextElementSibling.querySelectorAll("tbody tr")];
    field.addEventListener("input", () => {
      const wanted = field.value.toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    });
  }
})();
