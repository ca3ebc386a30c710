// What was deployed, and what two deployments differ in.

import { get } from "./api.js";
import { commit, h, moment, projectChoices, table, tag } from "./dom.js";
import { link } from "./overview.js";

export async function history({ query, signal }) {
  const node = h("div");
  const chosen = new Set();
  const difference = h("div", { class: "diff" });
  const { projects } = await get("projects", {}, signal);
  const filters = { project: query.project ?? "", environment: query.environment ?? "", service: query.service ?? "" };
  let entries = [];
  let next = null;

  const list = h("div");
  const draw = () => list.replaceChildren(
    table("Deployments", ["", "Time", "Service", "Deployment", "Version", "Commit", "State", "By"], entries.map(row), "No deployment fits."),
    next ? h("p", {}, h("button", { type: "button", onclick: () => more(false) }, "Show older ones")) : "");
  const more = async (anew) => {
    const page = await get("history", { ...filters, limit: 50, cursor: anew ? undefined : next }, signal);
    entries = anew ? page.history : [...entries, ...page.history];
    next = page.next;
    draw();
  };
  const compare = async () => {
    const [a, b] = [...chosen].map((id) => entries.find((e) => e.deployment === id)).sort((x, y) => x.position - y.position);
    const [before, after] = await Promise.all([a, b].map((e) => get(`deployments/${e.deployment}`, {}, signal)));
    difference.replaceChildren(h("h2", {}, "What changed between them"), differences(before.snapshot, after.snapshot));
  };
  const row = (e) => {
    const box = h("input", { type: "checkbox", id: `choose-${e.deployment}`, "aria-label": `compare ${e.deployment}` });
    box.checked = chosen.has(e.deployment);
    box.addEventListener("change", () => {
      if (box.checked) chosen.add(e.deployment);
      else chosen.delete(e.deployment);
      while (chosen.size > 2) chosen.delete(chosen.values().next().value);
      draw();
      if (chosen.size === 2) compare();
      else difference.replaceChildren();
      document.getElementById(box.id)?.focus();
    });
    return [box, moment(e.timestamp), `${e.project}.${e.environment}.${e.service}`, link(e.deployment), e.version,
      h("td", { class: "wide" }, e.source_commit ? [h("span", { class: "mono" }, commit(e.source_commit)), ` ${(e.source_commit_message ?? "").split("\n")[0]}`] : "", e.outcome ? h("div", { class: "quiet" }, e.outcome) : null),
      tag(e.status), e.actor.id];
  };
  const field = (name) => {
    const input = h("input", { name, value: filters[name], autocomplete: "off" });
    input.addEventListener("change", () => { filters[name] = input.value.trim(); more(true); });
    return h("label", {}, name, input);
  };
  const project = h("select", { name: "project" }, h("option", { value: "" }, "all"), projectChoices(projects, filters.project).map(([value, text]) => h("option", { value, selected: value === filters.project }, text)));
  project.addEventListener("change", () => { filters.project = project.value; more(true); });
  await more(true);
  node.append(h("h1", {}, "History"),
    h("form", { class: "filters", onsubmit: (e) => e.preventDefault() }, h("label", {}, "project", project), field("environment"), field("service")),
    h("p", { class: "quiet" }, "Choose two to see what they differ in."), list, difference);
  return { title: "History", node, refresh: (events) => (events?.some((e) => e.type.includes(".deployment.")) && entries.length <= 50 ? more(true) : null) };
}

/** The leaves of a value, by path. */
function leaves(value, path = "", all = new Map()) {
  if (value !== null && typeof value === "object" && Object.keys(value).length > 0) {
    for (const [key, inner] of Object.entries(value)) leaves(inner, path ? `${path}.${key}` : key, all);
  } else {
    all.set(path, JSON.stringify(value));
  }
  return all;
}

function differences(before, after) {
  const [a, b] = [leaves(before), leaves(after)];
  const paths = [...new Set([...a.keys(), ...b.keys()])].sort().filter((p) => a.get(p) !== b.get(p));
  return table("Differences", ["Field", "Before", "After"], paths.map((p) => [h("code", {}, p),
    h("td", { class: "wide" }, a.has(p) ? h("del", {}, a.get(p)) : ""), h("td", { class: "wide" }, b.has(p) ? h("ins", {}, b.get(p)) : "")]), "Their snapshots are the same.");
}
