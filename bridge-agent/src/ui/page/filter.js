// The filter: words that all must match. `key:value` looks at one field, other words at the whole row, `-` excludes.

const KEYS = {
  verdict: (row) => [row.verdict], reason: (row) => [row.reason], rule: (row) => [row.rule, row.name], proto: (row) => [row.protocol],
  src: (row) => [row.source], dst: (row) => [row.destination], port: (row) => [row.sourcePort, row.destinationPort],
  host: (row) => [row.source, row.destination], dir: (row) => [row.direction], state: (row) => [row.state],
  action: (row) => [row.action], node: (row) => [row.agent], dev: (row) => [row.interface],
};
const WHOLE = new Set(["port", "host", "src", "dst", "verdict", "proto", "node"]);

const SEARCHED = ["verdict", "reason", "direction", "protocol", "source", "sourcePort", "destination", "destinationPort", "rule",
  "interface", "state", "name", "action", "to", "route", "kind", "text", "netns", "process", "pod", "agent"];

export function parse(text) {
  const unknown = [];
  const tests = text.trim().split(/\s+/).filter(Boolean).map((word) => {
    const exclude = word.startsWith("-") && word.length > 1;
    const body = (exclude ? word.slice(1) : word).toLowerCase();
    const [, key, value] = /^([a-z]+):(.*)$/.exec(body) ?? [];
    let test;
    // Every object has fields by inheritance, such as `constructor`.
    const known = key && Object.hasOwn(KEYS, key);
    if (key && !known && !body.includes("::")) unknown.push(key);
    if (known) {
      const fits = WHOLE.has(key) ? (field) => field === value : (field) => field.includes(value);
      test = (row) => value === "" || KEYS[key](row).some((field) => field != null && fits(String(field).toLowerCase()));
    } else {
      test = (row) => SEARCHED.some((name) => row[name] != null && String(row[name]).toLowerCase().includes(body));
    }
    return exclude ? (row) => !test(row) : test;
  });
  return { unknown, matches: (row) => tests.every((test) => test(row)) };
}

// Adds a term, or removes it when it is there.
export function toggle(text, term) {
  const words = text.trim().split(/\s+/).filter(Boolean);
  return (words.includes(term) ? words.filter((word) => word !== term) : [...words, term]).join(" ");
}
