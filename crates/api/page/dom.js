// Elements without a template language: nothing that comes from the ledger is ever parsed as HTML.

import { errand } from "./api.js";

/** An element with attributes and children; `onclick` and the like are listeners. */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** An element of a drawing. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** A row of a table whose columns have these names. On a phone a row of a table of the class `stack`
 *  is a card, and each cell says what it is. */
export function row(columns, cells) {
  return h("tr", {}, cells.map((c, i) => {
    const cell = c instanceof HTMLTableCellElement ? c : h("td", {}, c ?? "");
    if (typeof columns[i] === "string" && columns[i]) cell.dataset.label = columns[i];
    return cell;
  }));
}

/** A table with the names of its columns; rows are lists of cells. */
export function table(caption, columns, rows, empty, kind) {
  if (rows.length === 0) return h("p", { class: "quiet" }, empty);
  const head = h("tr", {}, columns.map((c) => h("th", { scope: "col" }, c)));
  const all = h("table", { "aria-label": caption, class: kind }, h("thead", {}, head), h("tbody", {}, rows.map((cells) => row(columns, cells))));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, all);
}

/** A text with what is looked for marked in it, wherever it stands. */
export function marked(text, wanted) {
  if (!wanted) return [text];
  const parts = [];
  const [all, part] = [text.toLowerCase(), wanted.toLowerCase()];
  // A few letters become more than one when they are made small: then places are not comparable.
  if (all.length !== text.length) return [text];
  let from = 0;
  for (let at = all.indexOf(part); at >= 0; at = all.indexOf(part, from)) {
    parts.push(text.slice(from, at), h("mark", {}, text.slice(at, at + part.length)));
    from = at + part.length;
  }
  return [...parts, text.slice(from)];
}

/** A moment, in the reader's own zone; the exact one in its title. */
export function moment(text) {
  if (!text) return "";
  const at = new Date(text);
  const today = at.toDateString() === new Date().toDateString();
  const shown = at.toLocaleString(undefined, today ? { timeStyle: "medium" } : { dateStyle: "short", timeStyle: "short" });
  return h("time", { datetime: text, title: text }, shown);
}

/** A duration in words: `340 ms`, `2.4 s`, `3 min 5 s`. */
export function duration(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  return `${Math.floor(ms / 60_000)} min ${Math.round((ms % 60_000) / 1000)} s`;
}

export const short = (id) => (id ?? "").slice(-8);
export const commit = (id) => (id ?? "").slice(0, 7);

const GOOD = new Set(["started", "ready", "sound", "proven", "ok", "delivering", "delivered"]);
const BAD = new Set(["failed", "start_error", "stop_error", "terminate_error", "not_ready", "broken", "not_proven", "partially_started", "failing", "drifted", "set_aside", "dead_lettered", "gone"]);
const BUSY = new Set(["requested", "queued", "cloning", "building", "pushing", "packaging", "awaiting_approval", "deploying", "starting", "stopping", "terminating", "pending", "retrying"]);

/** A state as a coloured word. The word says all; the colour only helps. */
export function tag(word, title, before = "") {
  const kind = GOOD.has(word) ? "good" : BAD.has(word) ? "bad" : BUSY.has(word) ? "busy" : "";
  return h("span", { class: `tag ${kind}`, title }, before, String(word).replaceAll("_", " "));
}

/** What is wrong and what helps. */
export function problem(p) {
  if (!p) return null;
  const code = p.code ?? p.reason ?? "";
  return h("div", { class: "problem" }, h("strong", {}, code), " ", p.message ?? "", p.remedy ? h("p", { class: "quiet" }, p.remedy) : null);
}

/** A refusal, where it happened. */
export function refused(error) {
  const shown = problem(error.problem ?? { message: error.message });
  shown.setAttribute("role", "alert");
  return shown;
}

const ROLES = { deploy: "deployer", approve: "approver", configure: "admin" };

/** Says why there is nothing to be done here, to whoever may not. */
export function onlyLooks(verb) {
  return h("p", { class: "quiet" }, `You may look at this and not change it: that takes the role ${ROLES[verb]}${verb === "configure" ? "" : " or admin"} in this project.`);
}

/** The three answers to "is it up?", each with its reason. */
export function answers(of) {
  const one = (name, a) => a && h("li", {}, tag(a.state, `${name}: ${a.reason}${a.message ? `, ${a.message}` : ""}`, `${name} `));
  return h("ul", { class: "answers" }, one("build", of.build), one("workload", of.workload), one("endpoint", of.endpoint));
}

/** Facts as a list of terms; those without a value are left out. */
export function facts(pairs) {
  const known = pairs.filter(([, v]) => v !== null && v !== undefined && v !== "" && v !== false);
  return h("dl", { class: "facts" }, known.map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)]));
}

/** Tells something at the edge of the page for a while. */
export function notice(text, isError = false) {
  const shown = h("p", { class: `notice ${isError ? "error" : ""}` }, text);
  document.getElementById("notices").append(shown);
  setTimeout(() => shown.remove(), isError ? 12_000 : 5000);
}

/** Asks before something is done, and does it: `submit` gets the reason, as a part of what is sent, and
 *  what sends it. What is refused for certain is told, and over; where it is not known what came of it,
 *  it can be asked for again. Resolves to the answer, or to null if nothing was done. What keeps no
 *  reason is not asked for one. */
export function ask(title, text, { danger = false, verb = "Do it", why = true, submit }) {
  const reason = h("input", { name: "reason", autocomplete: "off", maxlength: "500" });
  return fillIn(title, [h("p", {}, text), why ? h("label", {}, "Why (kept in the ledger; may be empty)", reason) : ""], {
    verb, danger, over: true, submit: (given, order) => submit(given.reason ? { reason: given.reason } : {}, order),
  });
}

/** Lets somebody fill something in. `submit` gets what was given, by name, and what sends it; what is
 *  refused is shown, and can be put right. Resolves to what it answers, or to null if nothing is to be
 *  done. Nobody leaves before the answer: it may have what is shown once. */
export function fillIn(title, fields, { verb, submit, danger = false, over = false, leave = "Leave it" }) {
  return new Promise((resolve) => {
    const wrong = h("div");
    const order = errand();
    let answer = null;
    // Gone at once: the event comes later, and what is closed must not be pressed any more.
    const end = () => { dialog.close(); dialog.remove(); };
    const busy = (is) => { for (const button of [go, not]) button.disabled = is; };
    const form = h("form", { class: "fill", onsubmit: async (event) => {
      event.preventDefault();
      if (go.disabled) return;
      wrong.replaceChildren();
      const given = Object.fromEntries(new FormData(form));
      busy(true);
      try {
        answer = await submit(given, order);
        end();
      } catch (error) {
        if (over && !error.open) {
          notice(error.message, true);
          end();
        }
        wrong.replaceChildren(refused(error));
        wrong.scrollIntoView({ block: "nearest" });
      }
      busy(false);
    } });
    const go = h("button", { class: danger ? "danger" : "" }, verb);
    const not = h("button", { type: "button", onclick: end }, leave);
    const dialog = h("dialog", { "aria-labelledby": "asked", oncancel: (event) => { if (go.disabled) event.preventDefault(); } }, form);
    form.append(h("h2", { id: "asked" }, title), ...fields, wrong, h("div", { class: "row" }, go, leave ? not : ""));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(answer);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** The projects to choose from, by name: with the one that a link names though it is not among them. What
 *  is asked for is never replaced by something else. */
export function projectChoices(projects, wanted) {
  const names = projects.map((p) => p.name);
  return [...names, ...(wanted && !names.includes(wanted) ? [wanted] : [])].map((name) => [name, name]);
}

/** A line that says that a stream is broken off, while it is. */
export function connection() {
  const node = h("p", { class: "quiet", role: "status", hidden: true });
  const onState = (there, why = "Not connected; trying again.") => {
    node.hidden = there;
    node.textContent = there ? "" : why;
  };
  return { node, onState };
}

/** Runs something once it was not asked for a while; for ever so often asked, at the latest after `most`. */
export function settled(work, most) {
  let due;
  let since;
  return (ms) => {
    clearTimeout(due);
    since ??= Date.now();
    due = setTimeout(() => {
      since = undefined;
      work();
    }, Math.max(0, Math.min(ms, since + most - Date.now())));
  };
}

/** Replaces what an element holds; whoever was at a button of it is at the same one afterwards. */
export function replace(element, ...children) {
  const at = element.contains(document.activeElement) ? document.activeElement.id : "";
  element.replaceChildren(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
  if (at) document.getElementById(at)?.focus({ preventScroll: true });
}
