// Pictures in full size: every `.shot` opens a dialog. Left and right go to the neighbours of its lane, up and down to the same item in
// another lane; data-lane, data-item and data-said say which and what is told of it.
function viewer() {
  const box = document.createElement("dialog");
  box.className = "viewer";
  box.setAttribute("aria-label", "Picture in full size");
  box.innerHTML = '<div class="viewed"></div><p class="told"></p><div class="ways"></div>';
  const told = box.querySelector(".told");
  told.setAttribute("aria-live", "polite");
  document.body.append(box);
  const shots = () => [...document.querySelectorAll(".shot")].filter((shot) => shot.offsetParent);
  let now = null;
  const show = (shot) => {
    if (!shot) return;
    now = shot;
    const inside = shot.querySelector("img, video"), full = inside.cloneNode(true);
    full.removeAttribute("loading");
    if (full.tagName === "VIDEO") full.controls = true;
    box.querySelector(".viewed").replaceChildren(full);
    told.textContent = shot.dataset.said;
    if (!box.open) box.showModal();
  };
  const along = (step) => {
    const lane = shots().filter((shot) => shot.dataset.lane === now.dataset.lane);
    show(lane[lane.indexOf(now) + step]);
  };
  const across = (step) => {
    const same = shots().filter((shot) => shot.dataset.item === now.dataset.item);
    show(same[(same.indexOf(now) + step + same.length) % same.length]);
  };
  const ways = [["‹ previous", () => along(-1)], ["next ›", () => along(1)], ["other model", () => across(1)], ["close", () => box.close()]];
  for (const [text, go] of ways) {
    if (text === "other model" && !document.querySelector("[data-lanes]")) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", go);
    box.querySelector(".ways").append(button);
  }
  const keys = { ArrowLeft: () => along(-1), ArrowRight: () => along(1), ArrowUp: () => across(-1), ArrowDown: () => across(1) };
  box.addEventListener("keydown", (event) => {
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });
  box.addEventListener("click", (event) => { if (event.target === box) box.close(); });
  box.addEventListener("close", () => now && now.focus());
  document.addEventListener("click", (event) => {
    const shot = event.target.closest(".shot");
    if (shot) show(shot);
  });
}
viewer();
