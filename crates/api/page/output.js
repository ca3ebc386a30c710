// What a deployment printed: its build, its instances, the workers and the platform, as it comes, with
// search among the lines.

import { follow, save } from "./api.js";
import { connection, h, marked, refused } from "./dom.js";

/** At most so many lines are kept in the page. */
const LINES = 5000;
/** So many are shown around a line that somebody was sent to. */
const AROUND = 100;

const LEVELS = ["DEBUG", "INFO", "WARN", "ERROR"];

export const select = (name, choices, chosen) => h("select", { name }, choices.map(([value, text]) => h("option", { value, selected: value === (chosen ?? "") }, text)));
export const KIND_CHOICES = [["", "all kinds"], ["build", "build"], ["container", "container"], ["status", "status"], ["platform", "platform"]];
export const LEVEL_CHOICES = [["", "any level"], ["info", "info and worse"], ["warn", "warnings and errors"], ["error", "errors"]];

/** Where a line was printed, or what printed it. */
export const origin = (line) => [line.cluster, line.instance].filter(Boolean).join("/") || line.kind;

/** Its class, by how bad it says that it is. */
export const grade = (line) => (line.level === "ERROR" ? "bad" : line.level === "WARN" ? "warn" : "");

/** The lines of a deployment. `at` is the cursor of one of them: those around it are shown then, and
 *  otherwise the newest, and those that come. */
export function output(id, at, signal) {
  const path = `deployments/${encodeURIComponent(id)}/logs`;
  const place = /^(all|\d{1,15})-(\d{1,15})$/.exec(at ?? "");
  const wantedSeq = place ? Number(place[1] === "all" ? place[2] : place[1]) : 0;
  const wantedOfBuild = place ? place[1] !== "all" : false;

  const pre = h("pre", { class: "lines", role: "log", "aria-live": "off", tabindex: "0", "aria-label": "Output of the deployment" });
  const search = h("input", { type: "search", placeholder: "Search", "aria-label": "Search in the output" });
  const kinds = select("type", KIND_CHOICES);
  kinds.setAttribute("aria-label", "Kind of lines");
  const levels = select("level", LEVEL_CHOICES);
  levels.setAttribute("aria-label", "Level of lines");
  const count = h("span", { class: "quiet", role: "status" });
  const newest = h("button", { type: "button", hidden: true, onclick: () => toEnd() }, "To the newest");
  const wrong = h("div");
  const broken = connection();
  const kept = () => save(path, { q: search.value, type: kinds.value, level: levels.value }, `${id}.log`).catch((error) => wrong.replaceChildren(refused(error)));

  // Each line with its element, once it is drawn; null if it does not fit what is looked for.
  const lines = [];
  let left = false;
  let drawn = 0;
  const fits = (line) => (!kinds.value || line.kind === kinds.value)
    && (!levels.value || LEVELS.indexOf(line.level) >= LEVELS.indexOf(levels.value.toUpperCase()))
    && (!search.value || line.text.toLowerCase().includes(search.value.toLowerCase()));
  const element = (one) => {
    const time = new Date(one.line.time).toLocaleTimeString(undefined, { hour12: false });
    return h("span", { class: `line ${grade(one.line)} ${one.wanted ? "wanted" : ""}`, tabindex: one.wanted ? "-1" : null },
      h("span", { class: "quiet" }, `${time} ${origin(one.line)} `), marked(one.line.text, search.value), "\n");
  };
  const atEnd = () => pre.scrollHeight - pre.scrollTop - pre.clientHeight < 40;
  const toEnd = () => { pre.scrollTop = pre.scrollHeight; };
  const tell = () => {
    count.textContent = `${drawn} of ${left ? "the newest " : ""}${lines.length} lines`;
    newest.hidden = Boolean(place) || atEnd();
  };
  const draw = (some) => {
    const follows = !place && atEnd();
    for (const one of some) {
      one.element = fits(one.line) ? element(one) : null;
      if (one.element) drawn += 1;
    }
    pre.append(...some.map((one) => one.element).filter(Boolean));
    while (lines.length > LINES) {
      const gone = lines.shift();
      left = true;
      if (gone.element) drawn -= 1;
      gone.element?.remove();
    }
    if (follows) toEnd();
    tell();
  };
  const redraw = () => {
    pre.replaceChildren();
    drawn = 0;
    draw(lines);
    if (!place) toEnd();
  };
  pre.addEventListener("scroll", tell, { passive: true });
  search.addEventListener("input", redraw);
  kinds.addEventListener("change", redraw);
  levels.addEventListener("change", redraw);

  // What came since the last drawing.
  let come = [];
  let due;
  const ends = new AbortController();
  signal.addEventListener("abort", () => ends.abort());
  let build = place && wantedOfBuild ? String(Math.max(0, wantedSeq - AROUND - 1)) : "0";
  let last = !place ? undefined : wantedOfBuild ? `${build}-0` : `all-${Math.max(0, wantedSeq - AROUND - 1)}`;
  const take = (event) => {
    const line = JSON.parse(event.data);
    if (line.text === undefined) return;
    last = event.id;
    const [ofBuild] = line.cursor.split("-");
    const isOfBuild = ofBuild !== "all" && ofBuild !== build;
    build = ofBuild;
    const wanted = Boolean(place) && line.seq === wantedSeq && isOfBuild === wantedOfBuild;
    const one = { line, wanted };
    lines.push(one);
    come.push(one);
    if (place && lines.length >= 10 * AROUND) ends.abort();
    due ??= setTimeout(() => {
      due = undefined;
      const some = come;
      come = [];
      draw(some);
      const found = some.find((o) => o.wanted);
      if (found) show(found.element);
    }, 80);
  };
  // It may come before the view is on the page.
  const show = (found) => {
    if (signal.aborted) return;
    if (!found?.isConnected) return requestAnimationFrame(() => show(found));
    found.scrollIntoView({ block: "center" });
    found.focus({ preventScroll: true });
  };

  let open = false;
  const goOn = async () => {
    if (open || ends.signal.aborted) return;
    open = true;
    const query = place ? "" : "?follow=true&running=true";
    await follow(`/api/v1/${path}${query}`, take, {
      last, signal: ends.signal, onState: broken.onState, onRefused: (error) => {
        wrong.replaceChildren(refused(error));
        ends.abort();
      },
    });
    // What ended with the deployment goes on with it; what was around a line is all there.
    open = Boolean(place);
  };
  goOn();

  const all = h("a", { href: `#/deployments/${encodeURIComponent(id)}` }, "show all of it, as it comes");
  return {
    goOn,
    node: h("div", { class: "output" },
      place ? h("p", {}, "Around the line that you were sent to; ", all, ".") : null,
      h("div", { class: "row" }, search, kinds, levels, h("button", { type: "button", onclick: kept }, "Keep as a file"), newest, count),
      wrong, broken.node, pre),
  };
}
