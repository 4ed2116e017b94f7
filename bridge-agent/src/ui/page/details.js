// The details of a row: a sentence, every field, and the agent's explanation with the change that would allow it.

import { ask } from "./agent.js";
import { $, at, h, span, tone } from "./dom.js";

const NAMES = {
  agent: "Node", time: "Time", verdict: "Verdict", reason: "Reason", direction: "Direction", protocol: "Protocol", rule: "Rule", interface: "Interface",
  length: "Length in bytes", generation: "Policy generation", suppressed: "Events kept back before it", state: "State", fastPath: "Fast path",
  times: "Times seen", kind: "Kind", text: "Text", name: "Name", action: "Action", hits: "Hits", bytes: "Bytes of first packets",
  to: "Network", source: "Source", origin: "Origin", route: "Route",
};
const SHOWN = Object.keys(NAMES);
let back = null;

const isPacket = (row) => row.destination !== undefined && row.protocol !== undefined;

function lead(row, reasons) {
  const way = `${at(row.source ?? "", row.sourcePort)} → ${at(row.destination ?? "", row.destinationPort)}`;
  if (row.verdict) return `${row.verdict === "allow" ? "Allowed" : ({ audit: "Let through by audit mode", "audit-allow": "Denied, and a rule in audit mode would allow it" })[row.verdict] ?? "Denied"}: ${reasons[row.reason] ?? row.reason}`;
  if (isPacket(row)) return `${way}, ${row.state}, opened ${span(row.ageSeconds)} ago, idle for ${span(row.idleSeconds)}.`;
  return row.reason ?? row.text ?? row.route ?? row.name ?? "";
}

const TONES = { ok: "allow", deny: "deny", unknown: "none" };

// The change that allows the connection, as the agent writes it; of a cluster, the policy first.
function allowed({ text, config, policy }, cluster) {
  const lines = (title, yaml, open) => {
    const copy = h("button", { type: "button", onclick: () => navigator.clipboard.writeText(yaml).then(() => { copy.textContent = "Copied"; }) }, "Copy");
    return yaml && h("details", { open }, h("summary", {}, title), h("pre", { tabindex: 0 }, yaml), copy);
  };
  const both = [lines("bridge.yaml", config, !cluster), lines("BridgePolicy", policy, cluster)];
  return [
    h("h3", {}, "To allow it"), h("p", {}, text), cluster ? both.reverse() : both,
    config && h("p", { class: "quiet" }, "Nothing is changed here. Widen it with care, and try it with ", h("code", {}, "bridge-agent apply --confirm"), "."),
  ];
}

// The way of the packet, stage by stage, as the agent explains it.
function explained({ summary, stages, nearly, remedy }, cluster) {
  return [
    h("h3", {}, "Why"),
    h("p", {}, summary),
    remedy ? allowed(remedy, cluster) : [],
    h("h3", {}, "Step by step"),
    h("ol", {}, stages.map(({ name, seen, why, outcome }) => h("li", {}, h("span", { class: `tag ${TONES[outcome]}` }, name), ` ${seen}`, why && h("small", { class: "quiet" }, why)))),
    nearly.length > 0 && h("h3", {}, "Rules that nearly match"),
    nearly.length > 0 && h("ul", {}, nearly.map(({ rule: name, criterion, has, asked }) => h("li", {}, h("code", {}, name), `: ${criterion} is ${asked}, the rule has ${has}`))),
  ].flat(Infinity).filter(Boolean);
}

const EVENT = ["time", "verdict", "reason", "direction", "protocol", "source", "sourcePort", "destination", "destinationPort", "rule", "interface",
  "length", "detail", "generation", "suppressed"];

function question(row) {
  const agent = row.agent ? { agent: row.agent } : {};
  if (row.verdict) return { ...agent, event: Object.fromEntries(EVENT.map((name) => [name, row[name] ?? null])) };
  return { ...agent, connection: { from: at(row.source, row.sourcePort), to: at(row.destination, row.destinationPort), protocol: row.protocol } };
}

async function explain(row, place) {
  try {
    const answer = await ask(`/api/explain?${encodeURIComponent(JSON.stringify(question(row)))}`);
    // An agent without this query: the sentence and the fields remain.
    if (answer) place.replaceChildren(...explained(answer, row.agent !== undefined));
  } catch (error) {
    place.replaceChildren(h("p", { class: "quiet" }, `No explanation: ${error.message}`));
  }
}

export function close() {
  $("details").hidden = true;
  back?.focus?.();
}

export function open(row, reasons) {
  back = document.activeElement;
  const title = isPacket(row) ? `${row.protocol} to ${at(row.destination, row.destinationPort)}` : row.name ?? row.to ?? row.kind ?? "Details";
  const fields = SHOWN.filter((name) => row[name] != null && row[name] !== "" && row[name] !== 0 && typeof row[name] !== "object");
  const packet = isPacket(row) ? [["Source", at(row.source, row.sourcePort)], ["Destination", at(row.destination, row.destinationPort)]] : [];
  const skip = isPacket(row) ? ["source", "text"] : [];
  const explanation = h("section", { "aria-live": "polite" });
  $("details").replaceChildren(
    h("div", { class: "title" }, h("h2", { id: "details-title" }, title), h("button", { type: "button", "aria-label": "Close the details", onclick: close }, "Close")),
    h("p", { class: "lead" }, row.verdict && h("span", { class: `tag ${tone(row.verdict)}` }, row.verdict), row.verdict ? " " : "", lead(row, reasons)),
    h("dl", {}, [...packet, ...fields.filter((name) => !skip.includes(name)).map((name) => [NAMES[name], String(row[name])])].map(([name, value]) => [h("dt", {}, name), h("dd", { class: "mono" }, value)])),
    explanation,
  );
  $("details").hidden = false;
  $("details").querySelector("button").focus();
  if (isPacket(row)) explain(row, explanation);
}
