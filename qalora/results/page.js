"use strict";
(() => {
  const { figures, states, dark } = JSON.parse(document.getElementById("figures").textContent);
  const darkPage = matchMedia("(prefers-color-scheme: dark)");
  const options = { displayModeBar: false };

  const coloured = (value) => {
    if (typeof value === "string") return (darkPage.matches && dark[value]) || value;
    if (Array.isArray(value)) return value.map(coloured);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item)]));
  };

  const slider = document.getElementById("round");
  const map = document.getElementById("rank-map");
  const shown = () => states[slider ? Number(slider.value) : states.length - 1];

  const draw = (id) => {
    const figure = coloured(figures[id]);
    if (id === "rank-map") {
      const trace = figure.data[0];
      const state = shown();
      Object.assign(trace, { z: state.ranks, customdata: state.changes, text: state.texts });
      // Numbers only where they fit.
      if (map.clientWidth < 26 * trace.x.length) trace.texttemplate = "";
    }
    figure.layout.font.family = getComputedStyle(document.body).fontFamily;
    figure.layout.width = document.getElementById(id).clientWidth;
    Plotly.react(id, figure.data, figure.layout, options);
  };

  const say = () => {
    const state = shown();
    const said = document.getElementById("round-said");
    if (said) said.innerHTML = `<b>${state.label}</b> · ${state.total.toLocaleString("en")} ranks`;
  };

  const all = () => Object.keys(figures).forEach(draw);
  all();
  if (slider) {
    say();
    slider.addEventListener("input", () => {
      say();
      draw("rank-map");
    });
  }
  darkPage.addEventListener("change", all);
  let waiting;
  const width = new ResizeObserver(() => {
    clearTimeout(waiting);
    waiting = setTimeout(all, 100);
  });
  width.observe(document.querySelector("main"));
})();
