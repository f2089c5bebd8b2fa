// Points and bars tell what they are.
for (const node of document.querySelectorAll(".drawing .bar, .drawing .dot, .drawing .line")) {
  const words = node.querySelector("title")?.textContent;
  if (!words) continue;
  node.addEventListener("mousemove", (event) => showTooltip([words], event.clientX, event.clientY));
  node.addEventListener("mouseleave", () => { tooltip.hidden = true; });
}
