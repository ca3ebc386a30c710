// The ledger itself: what was written, and proof that it was.

import { get } from "./api.js";
import { h, moment, table, tag } from "./dom.js";
import { hex, leafHash, prove } from "./merkle.js";

const bytes = async (path) => {
  const response = await fetch(`/tlog/${path}`);
  if (!response.ok) throw new Error(`/tlog/${path}: status ${response.status}`);
  return new Uint8Array(await response.arrayBuffer());
};
const text = async (path) => new TextDecoder().decode(await bytes(path));

export async function ledger({ rest: [position], signal }) {
  const node = h("div");
  const refresh = async () => node.replaceChildren(...(position ? await one(Number(position), signal) : await list(signal)));
  await refresh();
  return { title: position ? `Event ${position}` : "Ledger", node, refresh: position ? null : refresh };
}

async function list(signal) {
  const [report, { audit }] = await Promise.all([get("ledger", {}, signal), get("audit", { limit: 100 }, signal)]);
  return [h("h1", {}, "The ledger"),
    h("p", {}, `${report.head} events; `, report.signed ? `${report.signed.size} of them are signed with the root ` : "none is signed", report.signed ? h("code", {}, report.signed.root) : "", ". ", tag(report.condition.state)),
    report.condition.message ? h("p", { class: "problem" }, report.condition.message) : "",
    h("form", { class: "filters", onsubmit: (e) => { e.preventDefault(); location.hash = `#/ledger/${new FormData(e.target).get("position")}`; } },
      h("label", {}, "Show the event at position", h("input", { name: "position", type: "number", min: "1", max: String(report.head), required: true })), h("button", {}, "Show and prove")),
    table("Newest events", ["Position", "Time", "What happened", "By"], audit.map((e) => [
      h("a", { href: `#/ledger/${e.position}` }, String(e.position)), moment(e.time),
      h("td", { class: "wide" }, e.project ? h("span", { class: "quiet" }, `${[e.project, e.environment, e.service].filter(Boolean).join(".")} `) : null, e.summary, e.reason ? h("span", { class: "quiet" }, ` ${e.reason}`) : null),
      e.actor.id]), "Nothing was written yet.")];
}

async function one(position, signal) {
  const event = await get(`events/${position}`, {}, signal);
  const result = h("div", { role: "status" }, h("p", { class: "quiet" }, "Proving…"));
  prove(position, bytes, text).then(async (proof) => {
    const steps = [...proof.steps];
    if (proof.bytes) {
      const stored = JSON.parse(new TextDecoder().decode(proof.bytes));
      steps.unshift({ ok: stored.id === event.id, text: `what is shown below is what is stored (${hex(await leafHash(proof.bytes)).slice(0, 8)}…)` });
      shown.textContent = JSON.stringify(stored, null, 2);
    }
    result.replaceChildren(
      h("p", {}, tag(proof.proven ? "proven" : "not_proven"), proof.proven ? " In this browser: this event is in the signed ledger, as it stands here." : " What holds and what does not:"),
      h("ul", { class: "steps" }, steps.map((s) => h("li", { class: s.ok ? "" : "bad" }, s.text))),
      h("p", { class: "quiet" }, "Not proven by this: that the server shows everybody the same ledger, and that the key is the right one. ", h("code", {}, "daybook audit verify"), " with a key from elsewhere and the checkpoint of last time proves both."));
  }).catch((error) => result.replaceChildren(h("p", { class: "problem" }, `It could not be proven: ${error.message}`)));
  const shown = h("pre", { class: "json" }, JSON.stringify(event, null, 2));
  return [h("h1", {}, `Event ${position} `, h("span", { class: "quiet" }, event.type.replace("dev.daybook.", ""))),
    h("div", { class: "row" }, position > 1 ? h("a", { href: `#/ledger/${position - 1}` }, "← the one before") : null, h("a", { href: `#/ledger/${position + 1}` }, "the next one →")),
    h("h2", {}, "Proof"), h("div", { class: "card" }, result),
    h("h2", {}, "What was written"), h("div", { class: "card" }, shown)];
}
