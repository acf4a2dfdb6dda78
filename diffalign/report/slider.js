// A slider over moments, `#moment`: it shows what is named by the present one, `data-at="0 50"`, and hides the rest.
function slides() {
  const slider = document.getElementById("moment");
  if (!slider) return;
  const moments = slider.dataset.moments.split(" ");
  const show = () => {
    const now = moments[slider.value];
    document.getElementById("said").textContent = now;
    slider.setAttribute("aria-valuetext", "after " + now + " updates");
    for (const part of document.querySelectorAll("[data-at]")) part.hidden = !part.dataset.at.split(" ").includes(now);
  };
  slider.addEventListener("input", show);
  show();
}
slides();
