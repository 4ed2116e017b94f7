// Talks to the agent through `bridge-agent ui`. The token comes in the fragment and stays in this browser, for this origin, so that
// a bookmark of a view opens; it ends with the server that printed it.

const TOKEN = "bridge-token";

export function token() {
  const given = /token=([0-9a-f]+)/.exec(location.hash)?.[1];
  if (given) {
    localStorage.setItem(TOKEN, given);
    history.replaceState(null, "", location.pathname + location.search);
  }
  return localStorage.getItem(TOKEN);
}

const headers = (more = {}) => ({ Authorization: `Bearer ${token() ?? ""}`, ...more });

export async function ask(path) {
  const answer = await fetch(path, { headers: headers() });
  if (answer.status === 204) return null;
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw Object.assign(new Error(body.error ?? answer.statusText), { status: answer.status, code: body.code });
  return body;
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// Follows the events for ever; resumes after the last one when the connection is lost.
export async function follow({ event, connected, lost }) {
  let last = null;
  for (let wait = 250; ; wait = Math.min(wait * 2, 4000)) {
    try {
      const resume = last ? { "Last-Event-ID": last } : {};
      const answer = await fetch(`/api/events?last=1000`, { headers: headers({ Accept: "text/event-stream", ...resume }) });
      if (!answer.ok) {
        const body = await answer.json().catch(() => ({}));
        throw Object.assign(new Error(body.error ?? answer.statusText), { status: answer.status, code: body.code });
      }
      connected();
      wait = 250;
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        // The agent sends a comment every 5 seconds.
        const read = await Promise.race([reader.read(), pause(15000).then(() => ({ done: true }))]);
        if (read.done) {
          reader.cancel().catch(() => {});
          throw new Error("the agent has ended the stream");
        }
        const blocks = (rest + read.value).split("\n\n");
        rest = blocks.pop();
        for (const block of blocks) {
          const fields = {};
          for (const line of block.split("\n")) {
            const [, name, value] = /^(\w+): ?(.*)$/.exec(line) ?? [];
            if (name) fields[name] = value;
          }
          if (fields.id) last = fields.id;
          if (fields.event) event(fields.event, JSON.parse(fields.data), fields.id);
        }
      }
    } catch (error) {
      lost(error);
    }
    await pause(wait);
  }
}
