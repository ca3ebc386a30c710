// What waits for somebody to allow it, with the exact plan.

import { actor, get, may, session } from "./api.js";
import { ask, facts, h, moment, notice, onlyLooks, short, table } from "./dom.js";
import { link } from "./overview.js";

export async function approvals({ signal }) {
  const node = h("div");
  const refresh = async () => node.replaceChildren(...(await parts(signal)));
  await refresh();
  return { title: "Approvals", node, refresh };
}

async function parts(signal) {
  const { approvals: waiting, let_through: through } = await get("approvals", {}, signal);
  const name = h("input", { name: "actor", autocomplete: "username", value: actor.name });
  name.addEventListener("change", () => { actor.name = name.value.trim(); });
  return [h("h1", {}, "Approvals"),
    // Where tokens say who asks, nobody is asked.
    session.token ? "" : h("form", { class: "filters", onsubmit: (e) => e.preventDefault() }, h("label", {}, "You are (nobody checks this yet; it is recorded)", name)),
    waiting.length ? h("div", { class: "cards" }, waiting.map(card)) : h("p", { class: "quiet" }, "Nothing waits to be allowed or reviewed."),
    through?.length ? [h("h2", {}, "Let through a freeze, to be reviewed"), h("ul", {}, through.map((t) => h("li", {}, link(t.id), ` ${t.instance_id}, past ${t.freeze}: ${t.emergency.reason ?? ""}`)))] : ""].flat();
}

function card(a) {
  const plan = a.plan;
  const decide = async (verb, title, text, danger, body) => {
    const done = await ask(title, text, {
      danger, verb: title.replace("?", ""), submit: (reason, order) => order("POST", `deployments/${a.id}/${verb}`, { ...body, ...reason }),
    });
    if (done) notice("recorded");
  };
  const values = Object.entries(plan.values ?? {});
  return h("article", { class: "card" },
    h("header", {}, h("h3", {}, a.instance_id), link(a.id)),
    facts([
      ["plan", h("span", { class: "mono" }, a.hash)],
      ["asked for by", a.requester],
      ["author", a.author],
      ["source", plan.source ? h("span", { class: "mono" }, plan.source) : null],
      ["image", plan.image ? h("span", { class: "mono" }, plan.image.digest) : null],
      ["in place of", plan.main ? link(plan.main) : null],
      ["addresses", Object.entries(plan.routes).map(([name, now]) => h("div", { class: "mono" }, name, h("span", { class: "quiet" }, now.length ? ` now ${now.map(short).join(", ")}` : " new")))],
      ["approvals", a.waits ? `${a.grants.length} of ${plan.rule.required}${a.grants.length ? `: ${a.grants.map((g) => g.approver).join(", ")}` : ""}` : "let through in an emergency; to be reviewed"],
      ["until", a.expires ? moment(a.expires) : null],
    ]),
    values.length ? table("Values that change", ["Value", "Before", "After"], values.map(([k, v]) => [h("code", {}, k), v.before ?? "", v.after ?? ""]), "") : null,
    !may("approve", a.instance_id.split(".")[0]) ? onlyLooks("approve") : h("div", { class: "row" }, a.waits
      ? [h("button", { type: "button", id: `approve-${a.hash}`, onclick: () => decide("approve", "Approve?", "You allow exactly this plan. If anything of it changes, this counts no more.", false, { hash: a.hash }) }, "Approve this plan"),
         h("button", { type: "button", id: `reject-${a.hash}`, class: "danger", onclick: () => decide("reject", "Reject?", "The deployment fails, with who said so and why.", true, {}) }, "Reject")]
      : h("button", { type: "button", onclick: () => decide("review", "Review?", "You have looked at this emergency afterwards.", false, {}) }, "Reviewed")));
}
