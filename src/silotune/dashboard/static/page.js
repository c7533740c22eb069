// Puts sections that have changed in the place of the old ones. The page is whole without this script.
"use strict";
const sign = document.getElementById("live");
const keptOpen = (section) =>
  new Map([...section.querySelectorAll("details[id]")].map((each) => [each.id, each.open]));
const scrolled = (section) => [...section.querySelectorAll(".scroll")].map((each) => [each.scrollLeft, each.scrollTop]);

function put(name, html) {
  const section = document.getElementById(name);
  if (section === null || section.innerHTML.trim() === html.trim()) return;
  const open = keptOpen(section);
  const places = scrolled(section);
  const focused = section.contains(document.activeElement)
    ? [...section.querySelectorAll("a, summary, [tabindex]")].indexOf(document.activeElement)
    : -1;
  section.innerHTML = html;
  section.hidden = html.trim() === "";
  for (const [id, isOpen] of open) {
    const found = document.getElementById(id);
    if (found !== null) found.open = isOpen;
  }
  [...section.querySelectorAll(".scroll")].forEach((each, place) => {
    if (places[place]) [each.scrollLeft, each.scrollTop] = places[place];
  });
  if (focused >= 0) {
    const again = [...section.querySelectorAll("a, summary, [tabindex]")][focused];
    if (again) again.focus({ preventScroll: true });
  }
}

const source = new EventSource(document.body.dataset.live);
source.addEventListener("open", () => { sign.textContent = "live"; });
source.addEventListener("error", () => { sign.textContent = "not connected: trying again"; });
source.addEventListener("gone", () => { sign.textContent = "the folder is gone"; source.close(); });
source.addEventListener("sections", (event) => {
  for (const [name, html] of Object.entries(JSON.parse(event.data))) put(name, html);
  document.body.dataset.updates = String(Number(document.body.dataset.updates || 0) + 1);
});
