// The status of several nodes as one, in the form of one node's status.

const sum = (values) => values.reduce((total, value) => total + (value ?? 0), 0);
const each = (values) => [...new Set(values.filter((value) => value != null))];

// Packets that one engine denied and the other let through.
export const apart = (divergence) => {
  const by = [divergence?.deniedByIptables, divergence?.deniedByNftables].flatMap((causes) => Object.values(causes ?? {}));
  return sum([divergence?.deniedByEbpf, ...by]);
};

export function merged(nodes) {
  const up = nodes.filter((node) => node.status);
  // Parts of the nodes that have this part, with the name of the node.
  const parts = (name) => up.filter(({ status }) => status[name] != null).map(({ node, status }) => ({ node, ...status[name] }));
  const said = (list, texts) => list.flatMap((part) => (texts(part) ?? []).map((text) => `${part.node}: ${text}`));
  const [enforcements, firewalls, flows, routes, pools, clusters, trials] = ["enforcement", "firewall", "flows", "routes", "pool", "kubernetes", "trial"].map(parts);
  const some = (list, value) => (list.length > 0 ? value() : null);
  const whole = up.map(({ node, status }) => ({ node, ...status }));
  const failed = whole.filter((node) => node.reloads?.last?.error);
  return {
    enforcement: some(enforcements, () => ({
      mode: each(enforcements.map((one) => one.mode)).join(" and "), generation: each(enforcements.map((one) => one.generation)).sort((a, b) => a - b),
      interfaces: enforcements.flatMap((one) => one.interfaces), remarks: said(enforcements, (one) => one.remarks),
    })),
    firewall: some(firewalls, () => ({
      engine: each(firewalls.map((one) => one.engine)).join(" and "), failure: firewalls.find((one) => one.failure)?.failure,
      divergence: { deniedByEbpf: sum(firewalls.map((one) => apart(one.divergence))) },
    })),
    flows: some(flows, () => ({ established: sum(flows.map((one) => one.established)), halfOpen: sum(flows.map((one) => one.halfOpen)) })),
    routes: some(routes, () => ({ nextHops: sum(routes.map((one) => one.nextHops)), nextHopsDown: routes.flatMap((one) => one.nextHopsDown) })),
    pool: some(pools, () => ({
      available: sum(pools.map((one) => one.available)), held: sum(pools.map((one) => one.held)),
      busiest: Math.max(...pools.map((one) => one.busiest)), fullest: Math.max(...pools.map((one) => one.busiest / Math.max(1, one.available))), warm: sum(pools.map((one) => one.warm)),
      leases: { held: sum(pools.map((one) => one.leases?.held)) }, ports: each(pools.flatMap((one) => one.ports)),
      counters: { refusals: { all: sum(pools.flatMap((one) => [one.counters?.refusals, one.leases?.refusals].flatMap((all) => Object.values(all ?? {})))) } },
      mode: each(pools.map((one) => one.mode)).join(" and "), warnings: said(pools, (one) => one.warnings),
    })),
    kubernetes: some(clusters, () => ({ connected: clusters.every((one) => one.connected) })),
    trial: trials.sort((a, b) => a.secondsLeft - b.secondsLeft)[0] ?? null,
    warnings: said(whole, (one) => one.warnings),
    reloads: { last: failed.length > 0 ? { error: failed.map(({ node, reloads }) => `${node}: ${reloads.last.error}`).join("; ") } : null },
  };
}

// Sentences on nodes that do not answer.
export function silent({ nodes, problem }) {
  const down = nodes.filter((node) => node.error);
  const lines = down.slice(0, 4).map(({ node, error }) => `${node} does not answer: ${error}`);
  if (down.length > 4) lines.push(`${down.length - 4} more nodes do not answer.`);
  if (problem) lines.push(`The list of nodes is not current: ${problem}`);
  return lines;
}
