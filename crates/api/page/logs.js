// Lines of output, looked for in all deployments of a project.

import { get, save, within } from "./api.js";
import { h, marked, moment, projectChoices, refused, short } from "./dom.js";
import { KIND_CHOICES, LEVEL_CHOICES, grade, origin, select } from "./output.js";

/** Lines of one page. */
const PAGE = 100;
/** A page that found nothing is followed by the next one, so often at most. */
const EMPTY = 15;

const FILTERS = ["q", "level", "type", "environment", "service", "cluster", "instance", "from", "until"];

/** A moment as a field of the reader's own zone has it; nothing, if it is none. */
function local(text) {
  const at = new Date(text ?? "");
  return Number.isNaN(at.getTime()) ? "" : new Date(at - at.getTimezoneOffset() * 60_000).toISOString().slice(0, 19);
}

export async function logs({ query, signal }) {
  const { projects } = await get("projects", {}, signal);
  if (projects.length === 0) {
    return { title: "Logs", node: h("div", {}, h("h1", {}, "Logs"), h("p", { class: "quiet" }, "There is no project yet.")) };
  }
  const field = (name, text, more = {}) => h("label", {}, text, h("input", { name, value: query[name] ?? "", autocomplete: "off", spellcheck: "false", ...more }));
  const project = select("project", projectChoices(projects, query.project), query.project || projects[0].name);
  const known = h("datalist", { id: "known-services" });
  const environments = h("datalist", { id: "known-environments" });
  const learn = async () => {
    const of = projects.find((p) => p.name === project.value);
    known.replaceChildren(...(of?.services ?? []).map((s) => h("option", { value: s })));
    environments.replaceChildren();
    if (!of) return;
    const there = await get(`projects/${of.name}/environments`, {}, signal).catch(() => ({ environments: [] }));
    if (signal.aborted || project.value !== of.name) return;
    environments.replaceChildren(...there.environments.map((e) => h("option", { value: e.name })));
  };
  project.addEventListener("change", learn);

  const narrow = h("details", { open: ["cluster", "instance", "from", "until"].some((name) => query[name]) },
    h("summary", {}, "Where and when"),
    h("div", { class: "filters" },
      field("cluster", "Cluster"), field("instance", "Instance (pod, process)"),
      field("from", "Printed at this time or later", { type: "datetime-local", step: "1", value: local(query.from) }),
      field("until", "Printed before", { type: "datetime-local", step: "1", value: local(query.until) })));
  const status = h("p", { class: "quiet", role: "status" });
  const found = h("div", { class: "found" });
  const older = h("button", { type: "button", hidden: true, onclick: () => search(false) }, "Look at older ones");
  const newer = h("p", { hidden: true }, "There may be newer output. ", h("button", { type: "button", onclick: () => search(true) }, "Search again"));
  const wrong = h("div");

  /** What is looked for, as the server is asked and as the address says it. */
  const asked = () => {
    const given = new FormData(form);
    const entries = FILTERS.map((name) => [name, String(given.get(name) ?? "").trim()]).filter(([, value]) => value);
    const times = entries.map(([name, value]) => [name, name === "from" || name === "until" ? new Date(value).toISOString() : value]);
    return { project: project.value, query: Object.fromEntries(times) };
  };

  let running = null;
  // What was looked for, and where that goes on: a cursor is of its own search, whatever was filled in since.
  let sought = null;
  let next = null;
  let total = { lines: 0, searched: 0 };
  let shown = null;
  const draw = (line, text) => {
    if (shown?.deployment !== line.deployment) {
      const list = h("ol");
      shown = { deployment: line.deployment, list };
      found.append(h("section", { "aria-label": `${line.service} in ${line.environment}, ${short(line.deployment)}` },
        h("h2", { class: "plain" }, `${line.service} `, h("span", { class: "quiet" }, line.environment), " ", h("a", { class: "mono", href: `#/deployments/${line.deployment}` }, short(line.deployment))), list));
    }
    const place = `#/deployments/${line.deployment}?line=${line.cursor}`;
    shown.list.append(h("li", { class: grade(line) },
      h("a", { href: place, title: "this line in its deployment" }, moment(line.time)),
      h("span", { class: "quiet", title: origin(line) }, origin(line)), h("code", {}, marked(line.text, text))));
  };
  const search = async (anew) => {
    running?.abort();
    if (signal.aborted) return;
    const mine = (running = within(signal));
    if (anew) sought = asked();
    const { project: of, query: wanted } = sought;
    if (anew) {
      next = null;
      total = { lines: 0, searched: 0 };
      shown = null;
      found.replaceChildren();
      newer.hidden = true;
      // The address is that of this search, to be kept or sent to somebody.
      history.replaceState(null, "", `#/logs?${new URLSearchParams({ project: of, ...wanted })}`);
    }
    wrong.replaceChildren();
    older.hidden = true;
    if (!projects.some((p) => p.name === of)) {
      status.textContent = "";
      wrong.replaceChildren(refused({ problem: { code: "no_such_project", message: `There is no project ${of} that you may look at`, remedy: "Choose another one." } }));
      found.removeAttribute("aria-busy");
      return;
    }
    found.setAttribute("aria-busy", "true");
    try {
      for (let empty = 0; empty < EMPTY; empty += 1) {
        status.textContent = total.searched ? `Looking… ${total.searched.toLocaleString()} lines looked at` : "Looking…";
        const page = await get(`projects/${of}/logs`, { ...wanted, limit: PAGE, cursor: next }, mine.signal);
        if (mine.signal.aborted) return;
        for (const line of page.lines) draw(line, wanted.q);
        next = page.next;
        total = { lines: total.lines + page.lines.length, searched: total.searched + page.searched };
        if (page.lines.length || !next) break;
      }
      const looked = `${total.searched.toLocaleString()} lines that are kept were looked at`;
      status.textContent = `${total.lines === 0 ? "Nothing was found" : `${total.lines.toLocaleString()} found`}: ${looked}${next ? " so far" : ""}.`;
      older.hidden = !next;
    } catch (error) {
      if (mine.signal.aborted) return;
      status.textContent = "";
      wrong.replaceChildren(refused(error));
    } finally {
      if (running === mine) found.removeAttribute("aria-busy");
    }
  };
  const keep = () => {
    const { project: of, query: wanted } = asked();
    return save(`projects/${of}/logs`, wanted, `${of}.log`).catch((error) => wrong.replaceChildren(refused(error)));
  };
  const form = h("form", { class: "search", role: "search", onsubmit: (event) => { event.preventDefault(); search(true); } },
    h("div", { class: "filters" },
      h("label", {}, "Project", project),
      h("label", { class: "long" }, "Text, as it stands in a line", h("input", { name: "q", type: "search", value: query.q ?? "", autocomplete: "off", spellcheck: "false", maxlength: "1000" })),
      h("label", {}, "Level", select("level", LEVEL_CHOICES, query.level)),
      h("label", {}, "Kind", select("type", KIND_CHOICES, query.type)),
      field("environment", "Environment", { list: "known-environments" }), field("service", "Service", { list: "known-services" })),
    narrow, known, environments,
    h("div", { class: "row" }, h("button", {}, "Search"), h("button", { type: "button", onclick: keep }, "Keep all that fit as a file")));
  learn();
  // The view is there before what is found: a rare text is looked for in many lines.
  search(true);
  return {
    title: "Logs",
    node: h("div", {}, h("h1", {}, "Logs"), form, newer, wrong, status, found, h("p", {}, older)),
    // What is being read stays where it is.
    refresh: (events) => {
      if (events?.some((e) => e.type.includes(".deployment.") && e.subject?.startsWith(`${project.value}/`))) newer.hidden = false;
    },
  };
}
