// One deployment: its state and what can be done, where the time went, what happened, its output.

import { get, may } from "./api.js";
import { answers, ask, commit, duration, facts, h, moment, notice, onlyLooks, problem, short, svg, table, tag } from "./dom.js";
import { output } from "./output.js";
import { link } from "./overview.js";

const ACTIONS = {
  mark_main: { label: "Give it the traffic", path: "mark-main", text: "Every address of the service leads to this deployment from then on." },
  start: { label: "Start", path: "start", text: "Its instances are started again." },
  stop: { label: "Stop", path: "stop", text: "Its instances end; the deployment stays and can be started again.", danger: true },
  retry: { label: "Try again", path: "retry", text: "Clusters in which it failed try again." },
  redeploy: { label: "Deploy once more", path: "redeploy", text: "A new deployment of the same snapshot." },
  keep: { label: "Keep running", path: "keep", text: "What would stop it by itself is called off." },
  cancel: { label: "Cancel", path: "cancel", text: "It does not go live; what ran before runs on.", danger: true },
  terminate: { label: "Terminate", path: "terminate", text: "It is taken out of the GitOps repository, and cannot be started again.", danger: true },
  delete: { label: "Delete", method: "DELETE", text: "It is no longer listed. The ledger keeps its history.", danger: true },
};

export async function deployment({ rest: [id], query, signal }) {
  const head = h("div");
  const printed = output(id, query.line, signal);
  const happened = h("ol", { class: "timeline" });
  const refresh = async () => {
    const [detail, audit] = await Promise.all([
      get(`deployments/${encodeURIComponent(id)}`, {}, signal),
      get("audit", { deployment: id, limit: 200 }, signal),
    ]);
    head.replaceChildren(...top(detail));
    happened.replaceChildren(...audit.audit.toReversed().map(line));
    printed.goOn();
    return detail;
  };
  const detail = await refresh();
  const node = h("div", {}, head,
    h("h2", {}, "What happened"), h("div", { class: "card" }, happened),
    h("h2", { id: "output" }, "Output"), printed.node,
    h("details", {}, h("summary", {}, "Snapshot: what it was made from, for ever"), h("pre", { class: "json card" }, JSON.stringify(detail.snapshot, null, 2))));
  return {
    title: `${detail.instance_id} ${short(detail.id)}`, node,
    // Events of others do not concern it, but for switches.
    refresh: (events) => !events || events.some((e) => e.correlationid === detail.id || e.subject.includes(detail.id) || e.type.includes(".routing.")) ? refresh() : null,
  };
}

function top(d) {
  const possible = d.possibilities.filter((p) => p.possible);
  const allowed = may("deploy", d.project);
  const not = d.possibilities.filter((p) => !p.possible);
  return [
    h("h1", {}, `${d.instance_id} `, h("span", { class: "quiet mono" }, short(d.id)), " ", tag(d.state), d.main ? [" ", tag("main", "it takes the traffic of the service")] : null),
    h("div", { class: "cards" },
      h("section", { class: "card", "aria-label": "State" },
        answers(d.readiness), problem(d.failure), problem(d.cancelled && { code: "cancelled", message: d.cancelled.message }),
        facts([
          ["version", `${d.version}${d.source ? ` (${commit(d.source.commit)})` : ""}`],
          ["commit", d.source ? `${d.source.message.split("\n")[0]}, by ${d.source.author}` : null],
          ["image", d.image ? h("span", { class: "mono" }, `${d.image.tag} ${d.image.digest.slice(0, 19)}…`) : null],
          ["chart", d.chart ? h("span", { class: "mono" }, `${d.chart.chart}:${d.chart.version} ${d.chart.digest.slice(0, 19)}…`) : null],
          ["GitOps commit", d.commit ? h("span", { class: "mono" }, commit(d.commit)) : null],
          ["requested", moment(d.created_at)],
          ["reason", d.reason],
          ["repeats", d.redeploy_of ? link(d.redeploy_of) : null],
          ["promoted from", d.promoted_from ? `${d.promoted_from.environment}` : null],
          ["stops", d.stops ? [moment(d.stops.at), `, because ${d.stops.because}`] : null],
          ["waits", d.queue?.reason ?? null],
          ["held", d.hold?.waits ? [`by the freeze ${d.hold.freeze}`, d.hold.until ? [" until ", moment(d.hold.until)] : ""] : null],
          ["OpenAPI", d.openapi ? `${d.openapi.title ?? "a document"} ${d.openapi.version ?? ""} at ${d.openapi.path ?? ""}` : null],
          ["approvals", d.approval ? h("a", { href: "#/approvals" }, "asked for") : null],
        ])),
      h("section", { class: "card", "aria-label": "Clusters" }, h("h3", {}, "Clusters"),
        d.cluster_status.map((c) => [
          facts([[c.cluster, [tag(c.state), ` ${c.instances.filter((i) => i.ready).length} of ${c.wanted} ready`]],
            ...c.instances.filter((i) => i.restarts > 0).map((i) => [i.name, `${i.restarts} ${i.restarts === 1 ? "restart" : "restarts"}`])]),
          problem(c.problem)]),
        d.hostnames.length ? [h("h3", {}, "Addresses"), h("ul", {}, d.hostnames.map((a) => h("li", {}, h("a", { href: a.url, rel: "noreferrer" }, a.hostname), h("span", { class: "quiet" }, ` ${a.stickiness}`))))] : null),
      h("section", { class: "card", "aria-label": "Durations" }, h("h3", {}, "Where the time went"), bars(d))),
    d.endpoints.length ? [h("h2", {}, "From where users are"), d.endpoints.map(planes)] : null,
    h("h2", {}, "What can be done"),
    possible.length && !allowed ? onlyLooks("deploy") : h("div", { class: "row" }, possible.map((p) => act(d, p.name)), possible.length ? null : h("span", { class: "quiet" }, "Nothing any more.")),
    not.length ? h("details", {}, h("summary", {}, "What is not possible now, and why"),
      h("ul", {}, not.map((p) => h("li", {}, h("strong", {}, p.name.replaceAll("_", " ")), `: ${p.reason}`, p.remedy ? h("span", { class: "quiet" }, `; ${p.remedy}`) : null)))) : null,
  ].flat(Infinity).filter(Boolean);
}

const PLANES = { metadata: "metadata", route: "route object", dns: "DNS", tls: "TLS", http: "HTTP" };

/** An address, plane by plane, in the order in which a request meets them. */
function planes({ hostname, planes: seen }) {
  const what = (p) => [p.message ? h("div", {}, p.message) : null,
    p.expected && p.state !== "ok" ? h("div", {}, h("span", { class: "quiet" }, "expected "), h("code", {}, p.expected)) : null,
    p.actual ? h("div", {}, h("span", { class: "quiet" }, "found "), h("code", {}, p.actual)) : null,
    p.expires ? h("div", {}, h("span", { class: "quiet" }, "the certificate ends "), moment(p.expires)) : null];
  return [h("h3", { class: "mono" }, hostname),
    table(`Planes of ${hostname}`, ["Plane", "State", "Why", "What was seen", "Since"], seen.map((p) => [
      h("th", { scope: "row" }, PLANES[p.plane] ?? p.plane), tag(p.state), p.reason, h("td", { class: "wide" }, what(p)), moment(p.since)]), "", "stack")];
}

function act(d, name) {
  const action = ACTIONS[name];
  if (!action) return null;
  const perform = async () => {
    const done = await ask(`${action.label}?`, action.text, {
      danger: action.danger, verb: action.label,
      submit: (reason, order) => action.method === "DELETE"
        ? order("DELETE", `deployments/${d.id}${reason.reason ? `?reason=${encodeURIComponent(reason.reason)}` : ""}`)
        : order("POST", `deployments/${d.id}/${action.path}`, reason),
    });
    if (done) notice(`${action.label}: recorded`);
  };
  return h("button", { id: `act-${name}`, class: action.danger ? "danger" : "", type: "button", onclick: perform }, action.label);
}

/** How long it was in each state on its way to live. */
function bars(d) {
  const entered = Object.entries(d.entered).sort(([, a], [, b]) => new Date(a) - new Date(b));
  const way = ["requested", "queued", "cloning", "building", "pushing", "packaging", "awaiting_approval", "deploying"];
  const steps = [];
  for (let i = 0; i < entered.length; i++) {
    const [state, at] = entered[i];
    if (!way.includes(state)) continue;
    const end = entered[i + 1]?.[1];
    steps.push([state.replaceAll("_", " "), (end ? new Date(end) : new Date()) - new Date(at), !end]);
  }
  const longest = Math.max(1, ...steps.map(([, ms]) => ms));
  const bar = (ms) => svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: "track", width: 100, height: 10, rx: 1 }), svg("rect", { class: "bar", width: Math.max(0.6, (100 * ms) / longest), height: 10, rx: 1 }));
  const list = h("dl", { class: "bars" }, steps.map(([name, ms, open]) => [h("dt", {}, name), h("dd", {}, bar(ms)), h("dd", {}, duration(ms), open ? " so far" : "")]));
  const { total_ms: total, image_pull_ms: pull } = d.durations;
  return h("div", {}, list, h("p", { class: "quiet" }, [total !== null && `${duration(total)} in all`, pull !== null && pull !== undefined && `image fetched in ${duration(pull)}`].filter(Boolean).join(", ")));
}

function line(entry) {
  const who = entry.actor.kind === "system" ? entry.actor.id : `${entry.actor.id}`;
  return h("li", {}, moment(entry.time), h("span", {}, entry.summary, entry.reason ? h("span", { class: "quiet" }, ` ${entry.reason}`) : null,
    h("span", { class: "quiet" }, ` (${who}, `), h("a", { href: `#/ledger/${entry.position}` }, `event ${entry.position}`), h("span", { class: "quiet" }, ")")));
}
