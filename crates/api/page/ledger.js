// The ledger itself: what was written, and proof that it was.

import { get, getBytes } from "./api.js";
import { h, moment, table, tag } from "./dom.js";
import { hex, leafHash, prove, same } from "./merkle.js";

const bytes = (path) => getBytes(`/tlog/${path}`);
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

// What stands at a position, as far as it can be read. What was lost, and was recorded as lost, is no
// event.
function reading(stored) {
  const text = new TextDecoder().decode(stored);
  try {
    const event = JSON.parse(text);
    return { kind: String(event.type ?? "").replace("dev.daybook.", ""), shown: JSON.stringify(event, null, 2) };
  } catch {
    return { kind: "no event", shown: text };
  }
}

async function one(position, signal) {
  const told = await getBytes(`/api/v1/events/${position}`, signal);
  const result = h("div", { role: "status" }, h("p", { class: "quiet" }, "Proving…"));
  const { kind, shown } = reading(told);
  prove(position, bytes, text).then(async (proof) => {
    const steps = [...proof.steps];
    // What the tree has is one thing, and what this server answers with another.
    const isThis = Boolean(proof.bytes) && same(proof.bytes, told);
    if (proof.bytes) {
      steps.unshift({ ok: isThis, text: isThis
        ? `what is shown below is what is stored, byte for byte (${hex(await leafHash(told)).slice(0, 8)}…)`
        : "what is shown below is NOT what the signed ledger has at this position" });
    }
    const proven = proof.proven && isThis;
    result.replaceChildren(
      h("p", {}, tag(proven ? "proven" : "not_proven"), proven ? " In this browser: this event is in the signed ledger, as it stands here." : " What holds and what does not:"),
      h("ul", { class: "steps" }, steps.map((s) => h("li", { class: s.ok ? "" : "bad" }, s.text))),
      h("p", { class: "quiet" }, "Not proven by this: that the server shows everybody the same ledger, and that the key is the right one. ", h("code", {}, "daybook audit verify"), " with a key from elsewhere and the checkpoint of last time proves both."));
  }).catch((error) => result.replaceChildren(h("p", { class: "problem" }, `It could not be proven: ${error.message}`)));
  return [h("h1", {}, `Event ${position} `, h("span", { class: "quiet" }, kind)),
    h("div", { class: "row" }, position > 1 ? h("a", { href: `#/ledger/${position - 1}` }, "← the one before") : null, h("a", { href: `#/ledger/${position + 1}` }, "the next one →")),
    h("h2", {}, "Proof"), h("div", { class: "card" }, result),
    h("h2", {}, "What was written"), h("div", { class: "card" }, h("pre", { class: "json" }, shown))];
}
