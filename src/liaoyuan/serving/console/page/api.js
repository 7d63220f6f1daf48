// The console's own endpoints.

/** A question that was refused; status 404: it is not there any more, 0: nobody answers. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** GET /data/`what`; a list among the arguments comes several times, empty ones do not come. */
export async function ask(what, args = {}, signal = undefined) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(args)) {
    for (const each of Array.isArray(value) ? value : [value]) {
      if (each !== null && each !== undefined && each !== "" && each !== false) query.append(name, each);
    }
  }
  let response;
  try {
    response = await fetch(`/data/${what}?${query}`, { signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, String(error));
  }
  const reply = await response.json().catch(() => null);
  if (!response.ok) throw new Refusal(response.status, reply?.error?.message ?? `HTTP ${response.status}`);
  return reply;
}
