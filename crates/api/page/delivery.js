// The four measures of DORA, with the days that they were counted on.

import { get } from "./api.js";
import { duration, facts, h, projectChoices, svg } from "./dom.js";

const DAY = 86_400_000;

export async function delivery({ query, signal }) {
  const chosen = { project: query.project ?? "", days: 30 };
  const { projects } = await get("projects", {}, signal);
  const cards = h("div", { class: "cards" });
  const draw = async () => {
    const until = new Date();
    const from = new Date(until - chosen.days * DAY);
    const measured = await get("dora", { project: chosen.project || undefined, from: from.toISOString(), until: until.toISOString() }, signal);
    cards.replaceChildren(...(measured.instances.length === 0
      ? [h("p", { class: "quiet" }, "Nothing was delivered in this time.")]
      : measured.instances.map((i) => card(i, from, chosen.days))));
  };
  const select = (name, choices) => {
    const made = h("select", { name }, choices.map(([value, text]) => h("option", { value, selected: String(chosen[name]) === String(value) }, text)));
    made.addEventListener("change", () => { chosen[name] = typeof chosen[name] === "number" ? Number(made.value) : made.value; draw(); });
    return h("label", {}, name, made);
  };
  await draw();
  const node = h("div", {}, h("h1", {}, "How delivery goes"),
    h("form", { class: "filters", onsubmit: (e) => e.preventDefault() },
      select("project", [["", "all"], ...projectChoices(projects, chosen.project)]),
      select("days", [[7, "the last 7"], [30, "the last 30"], [90, "the last 90"]])),
    cards,
    h("p", { class: "quiet" }, "Counted from the ledger alone: ", h("code", {}, "daybook audit report dora"), " counts the same from an export."));
  return { title: "Delivery", node, refresh: (events) => (events?.some((e) => e.type.includes(".routing.") || e.type.includes(".deployment.")) ? draw() : null) };
}

const percent = (share) => (share === null || share === undefined ? null : `${Math.round(100 * share)} %`);
const spread = (s) => (s.samples === 0 ? null : `${duration(s.median_ms)} (nine of ten within ${duration(s.p90_ms)})`);

function card(measured, from, days) {
  const { counted } = measured;
  return h("section", { class: "card", "aria-label": measured.instance_id },
    h("header", {}, h("h2", { class: "plain" }, measured.instance_id)),
    chart(counted.deployments, counted.restores, from, days),
    facts([
      ["Deployments", `${measured.deployments} (${measured.deployments_per_day.toFixed(2)} a day)`],
      ["Lead time", spread(measured.lead_time) ?? "no commit is known"],
      ["Failed changes", measured.failed_changes > 0 ? `${measured.failed_changes} (${percent(measured.change_failure_rate)})` : "none"],
      ["Time to restore", spread(measured.time_to_restore)],
      ["Failed before", measured.failed_before > 0 ? String(measured.failed_before) : null],
    ]));
}

/** A bar for each day: what got the traffic, and below the line what it was taken from again. */
function chart(deployments, restores, from, days) {
  const count = (all, time) => {
    const found = new Array(days).fill(0);
    for (const one of all) {
      const day = Math.floor((new Date(time(one)) - from) / DAY);
      if (day >= 0 && day < days) found[day] += 1;
    }
    return found;
  };
  const [good, bad] = [count(deployments, (d) => d.time), count(restores, (r) => r.rollback.time)];
  const most = Math.max(1, ...good, ...bad);
  const bars = (found, kind, up) => found.flatMap((n, day) => (n === 0 ? [] : [svg("rect",
    { class: kind, x: day + 0.1, width: 0.8, y: up ? 30 - (28 * n) / most : 31, height: ((up ? 28 : 14) * n) / most })]));
  const text = `${deployments.length} deployments and ${restores.length} rollbacks in ${days} days`;
  return svg("svg", { class: "days", viewBox: `0 0 ${days} 46`, preserveAspectRatio: "none", role: "img", "aria-label": text },
    ...bars(good, "bar", true), svg("rect", { class: "axis", x: 0, y: 30, width: days, height: 0.6 }), ...bars(bad, "back", false));
}
