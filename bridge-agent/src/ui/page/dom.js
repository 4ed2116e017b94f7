// Builds elements. Text is always text: no string becomes markup.

export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "class") element.className = value;
    else if (value !== false && value != null) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

export function s(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

export const $ = (id) => document.getElementById(id);

// An address and port, with brackets around IPv6.
export const at = (address, port) => (address.includes(":") ? `[${address}]` : address) + (port ? `:${port}` : "");

export const count = (number) => Number(number ?? 0).toLocaleString("en");

export function span(seconds) {
  const parts = [[86400, "d"], [3600, "h"], [60, "min"]];
  for (const [length, unit] of parts) if (seconds >= length) return `${Math.floor(seconds / length)} ${unit}`;
  return `${Math.floor(seconds)} s`;
}

export const clock = (time) => new Date(time).toLocaleTimeString("en-GB");

// Colour class of a verdict; the word is always shown too.
export const tone = (verdict) => ({ allow: "allow", audit: "audit", "audit-allow": "audit", drop: "deny", reject: "deny", deny: "deny" })[verdict] ?? "none";
