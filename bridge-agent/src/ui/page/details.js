// The details of a row: a sentence, every field, the rule that would allow it, and the agent's explanation.

import { ask } from "./agent.js";
import { $, at, h, span, tone } from "./dom.js";

const NAMES = {
  agent: "Node", time: "Time", verdict: "Verdict", reason: "Reason", direction: "Direction", protocol: "Protocol", rule: "Rule", interface: "Interface",
  length: "Length in bytes", generation: "Policy generation", suppressed: "Events kept back before it", state: "State", fastPath: "Fast path",
  times: "Times seen", kind: "Kind", text: "Text", name: "Name", action: "Action", hits: "New flows", bytes: "Bytes of first packets",
  to: "Network", source: "Source", origin: "Origin", route: "Route",
};
const SHOWN = Object.keys(NAMES);
let back = null;

export function rule(row) {
  const external = row.direction === "outbound" ? row.destination : row.source;
  const pod = row.direction === "outbound" ? row.source : row.destination;
  const ports = ["tcp", "udp", "sctp"].includes(row.protocol) ? [`  ports: [${row.destinationPort}]`] : [];
  const net = (address) => `${address}/${address.includes(":") ? 128 : 32}`;
  return [`- name: ${row.protocol}-${row.destinationPort}`, `  direction: ${row.direction}`, `  protocol: ${row.protocol}`, ...ports,
    `  external: ["${net(external)}"]`, `  pods: ["${net(pod)}"]`, "  action: allow"].join("\n");
}

const isPacket = (row) => row.destination !== undefined && row.protocol !== undefined;

function lead(row, reasons) {
  const way = `${at(row.source ?? "", row.sourcePort)} → ${at(row.destination ?? "", row.destinationPort)}`;
  if (row.verdict) return `${row.verdict === "allow" ? "Allowed" : row.verdict === "audit" ? "Let through by audit mode" : "Denied"}: ${reasons[row.reason] ?? row.reason}`;
  if (isPacket(row)) return `${way}, ${row.state}, opened ${span(row.ageSeconds)} ago, idle for ${span(row.idleSeconds)}.`;
  return row.reason ?? row.text ?? row.route ?? row.name ?? "";
}

const TONES = { ok: "allow", deny: "deny", unknown: "none" };

// The way of the packet, stage by stage, as the agent explains it.
function explained({ summary, stages, nearly }) {
  return [
    h("h3", {}, "Why"),
    h("p", {}, summary),
    h("ol", {}, stages.map(({ name, seen, why, outcome }) => h("li", {}, h("span", { class: `tag ${TONES[outcome]}` }, name), ` ${seen}`, why && h("small", { class: "quiet" }, why)))),
    nearly.length > 0 && h("h3", {}, "Rules that nearly match"),
    nearly.length > 0 && h("ul", {}, nearly.map(({ rule: name, criterion, has, asked }) => h("li", {}, h("code", {}, name), `: ${criterion} is ${asked}, the rule has ${has}`))),
  ].filter(Boolean);
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
    if (answer) place.replaceChildren(...explained(answer));
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
  const denied = row.verdict && row.verdict !== "allow";
  const title = isPacket(row) ? `${row.protocol} to ${at(row.destination, row.destinationPort)}` : row.name ?? row.to ?? row.kind ?? "Details";
  const fields = SHOWN.filter((name) => row[name] != null && row[name] !== "" && row[name] !== 0 && typeof row[name] !== "object");
  const packet = isPacket(row) ? [["Source", at(row.source, row.sourcePort)], ["Destination", at(row.destination, row.destinationPort)]] : [];
  const skip = isPacket(row) ? ["source", "text"] : [];
  const explanation = h("section", { "aria-live": "polite" });
  const remedy = denied && isPacket(row) ? h("pre", { tabindex: 0 }, rule(row)) : null;
  const copy = h("button", { type: "button", onclick: () => navigator.clipboard.writeText(remedy.textContent).then(() => { copy.textContent = "Copied"; }) }, "Copy the rule");
  $("details").replaceChildren(
    h("div", { class: "title" }, h("h2", { id: "details-title" }, title), h("button", { type: "button", "aria-label": "Close the details", onclick: close }, "Close")),
    h("p", { class: "lead" }, row.verdict && h("span", { class: `tag ${tone(row.verdict)}` }, row.verdict), row.verdict ? " " : "", lead(row, reasons)),
    h("dl", {}, [...packet, ...fields.filter((name) => !skip.includes(name)).map((name) => [NAMES[name], String(row[name])])].map(([name, value]) => [h("dt", {}, name), h("dd", { class: "mono" }, value)])),
    explanation,
    remedy ? h("section", {}, h("h3", {}, "A rule that allows it"), h("p", { class: "quiet" }, "Nothing is changed here. Widen it with care, and try it with ", h("code", {}, "bridge-agent apply --confirm"), "."), remedy, copy) : "",
  );
  $("details").hidden = false;
  $("details").querySelector("button").focus();
  if (isPacket(row)) explain(row, explanation);
}
