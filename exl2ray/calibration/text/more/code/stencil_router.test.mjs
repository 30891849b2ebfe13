import { after, before, describe, it, mock } from "node:test";
import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer } from "node:http";
import { Router, RouteConflict } from "../src/router.mjs";

describe("matching", () => {
  const r = new Router();
  r.get("/prints", () => "list");
  r.get("/prints/:id{[0-9]+}", ({ params }) => `print ${params.id}`);
  r.get("/prints/new", () => "form");
  r.get("/files/*path", ({ params }) => params.path);

  const body = async (path, method = "GET") => (await r.handle(new Request("http://x" + path, { method }))).text();

  it("prefers a literal over a parameter, whatever the order", async () => {
    assert.equal(await body("/prints/new"), "form");
    assert.equal(await body("/prints/17"), "print 17");
  });

  it("keeps slashes in a wildcard and decodes each segment once", async () => {
    assert.equal(await body("/files/2019/wood%20block%2Fred.svg"), "2019/wood block/red.svg");
    assert.equal(await body("/files/%2525"), "%25");
  });

  it("says which methods there are", async () => {
    const res = await r.handle(new Request("http://x/prints", { method: "DELETE" }));
    assert.equal(res.status, 405);
    assert.equal(res.headers.get("allow"), "GET, HEAD, OPTIONS");
  });

  for (const bad of ["/prints/%E0%A4%A", "/files/..%2f..%2fetc/passwd", "/prints/\u0000"]) {
    it(`answers 400 to ${JSON.stringify(bad)}`, async () => {
      const res = await r.handle({ url: "http://x" + bad, method: "GET", headers: new Headers() });
      assert.equal(res.status, 400);
    });
  }

  it("refuses two routes that no request could tell apart", () => {
    assert.throws(() => r.get("/prints/:number{[0-9]+}", () => ""), (e) => {
      assert.ok(e instanceof RouteConflict);
      assert.match(e.message, /:id.*:number/);
      return true;
    });
  });
});

describe("middleware", () => {
  it("runs like the skins of an onion, also when the core throws", async () => {
    const seen = [];
    const r = new Router();
    r.use(async (ctx, next) => {
      seen.push("a>");
      try {
        return await next();
      } catch (e) {
        seen.push(`a!${e.message}`);
        return new Response("sorry", { status: 503 });
      } finally {
        seen.push("<a");
      }
    });
    r.use(async (ctx, next) => {
      seen.push("b>");
      return next();
    });
    r.get("/", () => {
      throw new Error("ink");
    });
    const res = await r.handle(new Request("http://x/"));
    assert.equal(res.status, 503);
    assert.deepEqual(seen, ["a>", "b>", "a!ink", "<a"]);
  });

  it("complains when next() is called twice", async () => {
    const r = new Router();
    r.use(async (_, next) => {
      await next();
      return next();
    });
    r.get("/", () => "once");
    await assert.rejects(r.handle(new Request("http://x/")), /next\(\) called twice/);
  });
});

describe("over a socket", () => {
  let server, origin;
  before(async () => {
    const r = new Router();
    r.post("/echo", async ({ request }) => new Response(request.body, { headers: { "content-type": "text/plain" } }));
    r.get("/slow", async ({ signal }) => {
      await new Promise((resolve, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
    });
    server = createServer(r.listener).listen(0, "127.0.0.1");
    await once(server, "listening");
    origin = `http://127.0.0.1:${server.address().port}`;
  });
  after(() => server.close());

  it("streams a body back without reading all of it first", { timeout: 2000 }, async () => {
    const { readable, writable } = new TransformStream();
    const writer = writable.getWriter();
    const pending = fetch(origin + "/echo", { method: "POST", body: readable, duplex: "half" });
    await writer.write(new TextEncoder().encode("first "));
    const reader = (await pending).body.getReader();
    assert.equal(new TextDecoder().decode((await reader.read()).value), "first ");
    await writer.write(new TextEncoder().encode("second"));
    await writer.close();
    assert.equal(new TextDecoder().decode((await reader.read()).value), "second");
  });

  it("tells the handler that the visitor has gone", async (t) => {
    const warn = t.mock.method(console, "warn", () => {});
    const ctl = new AbortController();
    const gone = assert.rejects(fetch(origin + "/slow", { signal: ctl.signal }), { name: "AbortError" });
    setTimeout(() => ctl.abort(), 20);
    await gone;
    await new Promise((r) => setTimeout(r, 50));
    assert.equal(warn.mock.callCount(), 0, "a cancelled request is not worth a line in the log");
  });
});

mock.timers.reset();
