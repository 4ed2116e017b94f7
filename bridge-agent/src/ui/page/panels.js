// The views: columns of each table, and the cards of the pool.

import { at, clock, count, h, span, tone } from "./dom.js";

const tag = (word, kind = tone(word)) => h("span", { class: `tag ${kind}` }, word);
const end = (row, name) => at(row[name] ?? "", row[`${name}Port`]);

export const NODE = { title: "Node", width: "110px", narrow: "64px", cell: (row) => row.agent ?? "", sort: (row) => row.agent ?? "" };

export const EVENTS = (reasons) => [
  { wide: true, title: "Time", width: "76px", mono: true, cell: (row) => clock(row.time) },
  { title: "Verdict", width: "84px", narrow: "62px", cell: (row) => tag(row.verdict ?? "route", row.verdict ? tone(row.verdict) : "none") },
  { wide: true, title: "Times", width: "52px", number: true, cell: (row) => (row.times > 1 ? `×${count(row.times)}` : "") },
  { wide: true, title: "Protocol", width: "64px", cell: (row) => row.protocol ?? "" },
  { title: "Source", width: "minmax(190px, 1fr)", mono: true, cell: (row) => (row.kind ? row.kind : end(row, "source")) },
  { title: "Destination", width: "minmax(190px, 1fr)", mono: true, cell: (row) => (row.kind ? "" : end(row, "destination")) },
  { title: "Reason", width: "minmax(260px, 2fr)", cell: (row) => (row.kind ? row.text : (reasons[row.reason] ?? row.reason) + (row.rule ? ` (${row.rule})` : "")) },
];

export const FLOWS = [
  { wide: true, title: "Protocol", width: "72px", cell: (row) => row.protocol, sort: (row) => row.protocol },
  { title: "Source", width: "minmax(190px, 1fr)", mono: true, cell: (row) => end(row, "source"), sort: (row) => end(row, "source") },
  { title: "Destination", width: "minmax(190px, 1fr)", mono: true, cell: (row) => end(row, "destination"), sort: (row) => end(row, "destination") },
  { wide: true, title: "Direction", width: "84px", cell: (row) => row.direction, sort: (row) => row.direction },
  { title: "State", width: "110px", cell: (row) => row.state, sort: (row) => row.state },
  { wide: true, title: "Age", width: "70px", number: true, cell: (row) => span(row.ageSeconds), sort: (row) => row.ageSeconds },
  { title: "Idle", width: "70px", number: true, cell: (row) => span(row.idleSeconds), sort: (row) => row.idleSeconds },
  { title: "Rule", width: "minmax(120px, 1fr)", cell: (row) => row.rule ?? (row.seeded ? "from conntrack" : row.audit ? "audit mode" : `policy ${row.generation}`), sort: (row) => row.rule ?? "" },
];

export const RULES = [
  { title: "Rule", width: "minmax(140px, 2fr)", mono: true, cell: (row) => row.name, sort: (row) => row.name },
  { wide: true, title: "Direction", width: "110px", cell: (row) => row.direction, sort: (row) => row.direction },
  { title: "Action", width: "90px", cell: (row) => tag(row.action), sort: (row) => row.action },
  { title: "Hits", width: "110px", number: true, cell: (row) => count(row.hits), sort: (row) => row.hits },
  { wide: true, title: "Use", width: "minmax(120px, 1fr)", cell: (row) => (row.hits > 0 ? "" : tag("never hit", "none")) },
];

const fine = { installed: "allow", shadowed: "none", pending: "audit", partial: "audit" };
export const ROUTES = [
  { title: "Network", width: "minmax(150px, 1fr)", mono: true, cell: (row) => row.to, sort: (row) => row.to },
  { title: "State", width: "100px", cell: (row) => tag(row.state, fine[row.state] ?? "deny"), sort: (row) => row.state },
  { title: "Source", width: "100px", cell: (row) => row.source, sort: (row) => row.source },
  { title: "Route", width: "minmax(300px, 3fr)", mono: true, cell: (row) => row.reason ?? row.route },
];

export const LEASES = [
  { title: "Port", width: "64px", number: true, cell: (row) => String(row.port), sort: (row) => row.port },
  { wide: true, title: "Protocol", width: "76px", cell: (row) => row.protocol },
  { title: "Destination", width: "minmax(190px, 1fr)", mono: true, cell: (row) => row.destination ?? "any", sort: (row) => row.destination ?? "" },
  { title: "Holder", width: "minmax(170px, 1fr)", cell: (row) => `${row.command || "ended"} (pid ${row.pid})`, sort: (row) => row.command },
  { wide: true, title: "Kind", width: "80px", cell: (row) => tag(row.kind, "none"), sort: (row) => row.kind },
  { wide: true, title: "Age", width: "80px", number: true, cell: (row) => span((row.ageMs ?? 0) / 1000), sort: (row) => row.ageMs ?? 0 },
];

export function pool({ available, held, busiest, fullest, warm, leases, counters, ports, mode, warnings }) {
  const refused = [counters?.refusals, leases?.refusals].flatMap((all) => Object.values(all ?? {})).reduce((sum, number) => sum + number, 0);
  const meter = h("div", { class: "meter", "aria-hidden": "true" }, h("i"));
  meter.firstChild.style.width = `${Math.min(100, 100 * (fullest ?? busiest / Math.max(1, available)))}%`;
  const card = (title, value, note, extra) => h("div", {}, h("dt", {}, title), h("dd", {}, value, h("small", {}, note), extra));
  return [
    h("dl", { class: "cards" },
      card("Ports", count(available), `${ports.join(", ")}, towards each destination`),
      card("In use", count(held), `over all destinations, at most ${count(busiest)} towards one`, meter),
      card("Leased", count(leases?.held), "for clients of the API"),
      card("Refusals", count(refused), "connects and requests without a port"),
      card("Place", mode === "kernel" ? "kernel" : "agent", mode === "kernel" ? "hooks claim ports" : "no hooks: explicit leases only"),
      card("Warm", count(warm), "kept for the last user")),
    warnings.map((warning) => h("p", { class: "quiet" }, warning)),
  ];
}

export function hops(list) {
  return h("dl", { class: "cards" }, list.map((hop) => h("div", {}, h("dt", {}, `${hop.agent ? `${hop.agent}: ` : ""}next hop on ${hop.dev}`), h("dd", { class: "mono" }, hop.address, h("small", {}, tag(hop.up ? "answers" : "down", hop.up ? "allow" : "deny"))))));
}
