// The map: LAN hosts on the left, pods on the right, a ribbon for each pair and verdict.

import { $, count, h, s, tone } from "./dom.js";

const MOST = 8;
const ROW = 30;

// The ends of a flow or an event: the LAN host, and the pod or node.
export const ends = (row) => (row.direction === "outbound" ? [row.destination, row.source] : [row.source, row.destination]);

// Sums flows and denied packets by pair and tone.
export function pairs(flows, events) {
  const sums = new Map();
  const add = (row, kind, number) => {
    const [host, pod] = ends(row);
    const key = `${host} ${pod} ${kind}`;
    const pair = sums.get(key);
    if (pair) pair.number += number;
    else sums.set(key, { host, pod, kind, number });
  };
  for (const flow of flows) add(flow, flow.audit ? "audit" : "allow", 1);
  // Of `audit-allow`, the denial is an event of its own.
  for (const event of events) if (["drop", "reject", "audit"].includes(event.verdict)) add(event, tone(event.verdict), event.times ?? 1);
  return [...sums.values()];
}

function side(pairs, name) {
  const weights = new Map();
  for (const pair of pairs) {
    const node = weights.get(pair[name]) ?? { label: pair[name], allow: 0, audit: 0, deny: 0, total: 0 };
    node[pair.kind] += pair.number;
    node.total += pair.number;
    weights.set(pair[name], node);
  }
  const nodes = [...weights.values()].sort((a, b) => b.total - a.total || (a.label < b.label ? -1 : 1));
  const shown = nodes.slice(0, MOST).sort((a, b) => a.label.localeCompare(b.label, "en", { numeric: true }));
  const rest = nodes.slice(MOST);
  if (rest.length > 0) {
    const sum = (key) => rest.reduce((total, node) => total + node[key], 0);
    shown.push({ label: `${rest.length} more`, others: true, allow: sum("allow"), audit: sum("audit"), deny: sum("deny") });
  }
  return shown;
}

const sentence = ({ allow, audit, deny }) =>
  [[allow, "flow", "flows"], [deny, "denied packet", "denied packets"], [audit, "let through by audit mode"]].filter(([number]) => number > 0).map(([number, one, many = one]) => `${count(number)} ${number === 1 ? one : many}`).join(", ");

let last = "";

export function draw(pairs, pick) {
  const width = Math.max(320, $("map").clientWidth);
  // Unchanged input is drawn once: the focus stays.
  const input = JSON.stringify([pairs, width]);
  if (input === last) return;
  last = input;
  if (pairs.length === 0) {
    $("map").replaceChildren(h("p", {}, "No flow is known and nothing was denied yet."));
    return;
  }
  const sides = { host: side(pairs, "host"), pod: side(pairs, "pod") };
  const box = Math.min(width < 640 ? 132 : 300, Math.floor(width * 0.4));
  const rows = Math.max(sides.host.length, sides.pod.length);
  const height = rows * ROW + 30;
  const place = (name, label) => {
    const nodes = sides[name];
    const index = nodes.findIndex((node) => node.label === label);
    return 24 + (index < 0 ? nodes.length - 1 : index) * ROW + ((rows - nodes.length) * ROW) / 2;
  };
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": "Map of LAN hosts and pods" });
  svg.append(s("text", { class: "column", x: 2, y: 13 }, "LAN hosts"), s("text", { class: "column", x: width - 2, y: 13, "text-anchor": "end" }, "Pods and nodes"));
  const shift = { allow: -5, audit: 0, deny: 5 };
  const joined = new Map();
  for (const pair of pairs) {
    const [from, to] = [place("host", pair.host) + 12, place("pod", pair.pod) + 12];
    const key = `${from} ${to} ${pair.kind}`;
    joined.set(key, { from, to, kind: pair.kind, number: (joined.get(key)?.number ?? 0) + pair.number });
  }
  for (const { from, to, kind, number } of joined.values()) {
    const [y1, y2, middle] = [from + shift[kind], to + shift[kind], width / 2];
    const thick = Math.min(5, 1.5 + Math.log2(1 + number) / 2);
    svg.append(s("path", { class: kind, "stroke-width": thick.toFixed(1), d: `M${box} ${y1}C${middle} ${y1} ${middle} ${y2} ${width - box} ${y2}` }));
  }
  for (const name of ["host", "pod"]) {
    for (const node of sides[name]) {
      const [x, y] = [name === "host" ? 1 : width - box - 1, place(name, node.label)];
      const most = Math.floor((box - 16) / 7.4);
      const text = node.label.length > most ? `${node.label.slice(0, most - 1)}…` : node.label;
      const choose = () => pick(node.label);
      const keys = (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          choose();
        }
      };
      const button = node.others ? { "aria-label": `${node.label}: ${sentence(node)}`, role: "img" }
        : { tabindex: 0, role: "button", "aria-label": `${node.label}: ${sentence(node)}. Filter by this address`, onclick: choose, onkeydown: keys };
      svg.append(s("g", button, s("title", {}, `${node.label}: ${sentence(node)}`), s("rect", { x, y, width: box, height: 24, rx: 6 }), s("text", { x: x + 9, y: y + 16 }, text)));
    }
  }
  $("map").replaceChildren(svg);
}

export function legend() {
  $("map-legend").replaceChildren(
    h("span", {}, h("i", { class: "fill-allow" }), "flows"),
    h("span", {}, h("i", { class: "fill-deny" }), "denied (dashed)"),
    h("span", {}, h("i", { class: "fill-audit" }), "audit mode (dotted)"),
  );
}
