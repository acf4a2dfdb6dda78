// A served page is looked at again every few seconds: where its version is another, `#live` is taken from the new one.
function kept(live) {
  const slider = document.getElementById("moment");
  const open = [...live.querySelectorAll("details")].map((part) => part.open);
  const atEnd = slider && slider.value === slider.max;
  return { open, moment: slider && !atEnd ? slider.dataset.moments.split(" ")[slider.value] : null };
}
function restored(live, before) {
  const parts = live.querySelectorAll("details");
  if (parts.length === before.open.length) parts.forEach((part, k) => (part.open = before.open[k]));
  const slider = document.getElementById("moment");
  const place = slider && before.moment ? slider.dataset.moments.split(" ").indexOf(before.moment) : -1;
  if (place >= 0) slider.value = place;
  if (typeof slides === "function") slides();
}
function gone(live, is) {
  const note = document.getElementById("gone") || document.createElement("p");
  Object.assign(note, { id: "gone", className: "alarm", textContent: "The server does not answer: this is what was last seen." });
  note.setAttribute("role", "status");
  if (is) live.before(note);
  else note.remove();
}
async function look() {
  const live = document.getElementById("live");
  try {
    const answer = await fetch(location.pathname + "?version", { cache: "no-store" });
    if (answer.ok && (await answer.text()) !== live.dataset.version) {
      const page = await (await fetch(location.pathname, { cache: "no-store" })).text();
      const fresh = new DOMParser().parseFromString(page, "text/html").getElementById("live");
      const focus = document.activeElement && document.activeElement.id;
      const before = kept(live);
      live.replaceWith(fresh);
      restored(fresh, before);
      if (focus && document.getElementById(focus)) document.getElementById(focus).focus();
    }
    gone(document.getElementById("live"), false);
  } catch (error) {
    gone(document.getElementById("live"), true);
  }
  setTimeout(look, document.hidden ? 15000 : 2000);
}
setTimeout(look, 2000);
