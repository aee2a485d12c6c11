"""Style and script of the HTML page. Colours of ink, grid and paper are the style sheet's, in both themes."""

STYLE = """
:root { --paper: #ffffff; --card: #ffffff; --ink: #1a1f26; --soft: #5a6472; --rule: #dfe3e8; --grid: #e8ebef;
  --best: #00694c; --best-paper: #e5f4ee; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161b; --card: #181d24; --ink: #e6e9ed; --soft: #a0a9b5;
  --rule: #2c343e; --grid: #29313a; --best: #6fd6b2; --best-paper: #17352b; } }
@media print { :root { --paper: #ffffff; --card: #ffffff; --ink: #000000; --soft: #444444; --rule: #bbbbbb;
  --grid: #dddddd; --best: #00513b; --best-paper: #ffffff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 28px 24px 40px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 16px; margin: 0; } h3 { font-size: 14px; margin: 8px 0 0; font-weight: 600; }
.lead { font-size: 18px; line-height: 1.45; margin: 0 0 8px; max-width: 70em; }
.note, footer { color: var(--soft); font-size: 13px; margin: 0 0 6px; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 16px 18px 10px;
  margin-top: 16px; break-inside: avoid; }
footer { margin-top: 20px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 0 20px; }
.columns > div { min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; margin: 8px 0; }
th, td { padding: 6px 7px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
thead th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; line-height: 1.25; }
th:first-child, td.word { text-align: left; } thead th:last-child { text-align: left; }
tbody tr:last-child > * { border-bottom: 0; }
td.best { font-weight: 700; color: var(--best); background: var(--best-paper); }
.plot { width: 100%; min-width: 0; }
.plot text { fill: var(--ink) !important; }
.plot .hoverlayer text { fill: #ffffff !important; }
.plot .hoverlayer .hovertext path { fill: #333c47 !important; stroke: #a0a9b5 !important; }
.plot .gridlayer path { stroke: var(--grid) !important; }
.plot .cbaxis path { stroke: none !important; }
@media print { main { max-width: none; padding: 0; }
  body { font-size: 11pt; } th, td { padding: 3px 3px; font-size: 7pt; white-space: normal; }
  .scroll { overflow: visible; } }
"""

SCRIPT = """
(async () => {
  const plots = [...document.querySelectorAll(".plot")];
  try {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), c => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    for (const plot of plots) {
      const figure = JSON.parse(plot.firstElementChild.textContent);
      await Plotly.newPlot(plot, figure.data, figure.layout, { displayModeBar: false, responsive: true });
    }
    document.body.dataset.drawn = plots.length;
    addEventListener("beforeprint", () => plots.forEach(plot => Plotly.Plots.resize(plot)));
  } catch (problem) {
    for (const plot of plots) plot.textContent = "The figure could not be drawn: " + problem;
  }
})();
"""
