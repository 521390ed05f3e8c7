// node dashboard_driver.js BASE LOGIN-TOKEN API-KEY SHOTS-FOLDER: walks the dashboard in headless Chromium and prints one
// JSON object: {checks: {sentence: true | what went wrong}, copied: {name: text}, axe: [...], faults: [...]}.
const { faults, open, watch } = require("./dashboard_browser.js"), fs = require("fs"), http = require("http");
const [base, token, apiKey, shots] = process.argv.slice(2);
const axe = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const checks = {}, copied = {}, violations = [];
const EVIL = "<img src=x onerror=alert(1)>", RTL = "\u202egnp.exe", LONG = "x".repeat(10000);
const check = async (name, f) => { try { const r = await f(); checks[name] = r === undefined || r === true ? true : String(r); } catch (e) { checks[name] = String(e).slice(0, 300); } };
function call(method, path, body, headers = {}) {
  return new Promise((done, fail) => {
    const q = http.request(base + path, { method, headers: { authorization: "Bearer " + apiKey, "content-type": "application/json", ...headers } }, r => {
      let text = ""; r.on("data", d => text += d); r.on("end", () => done({ status: r.statusCode, text })); });
    q.on("error", fail); q.end(body); });
}
(async () => {
  const { browser, context, page } = await open(base);
  const go = async r => { await page.goto(base + "/admin#" + r); await page.waitForTimeout(250); };
  await page.goto(base + "/admin#login=" + token);
  await check("the one-use link logs in and leaves the address", async () => { await page.waitForSelector("#nav"); return page.url() === base + "/admin#overview"; });
  await check("an empty overview leads to the set-up", () => page.waitForSelector("text=No request yet", { timeout: 3000 }).then(() => true));
  // the live set-up page
  await go("setup");
  const seen = (title, cure) => page.waitForFunction(([t, c]) => [...document.querySelectorAll("#main tbody tr")].some(
    row => row.textContent.includes(t) && row.textContent.includes(c)), [title, cure], { timeout: 3000 }).then(() => true);
  const body = m => JSON.stringify({ model: m, input: "hi" });
  for (const [name, path, text, headers, title, cure] of [
    ["placeholder key", "/v1/responses", body("demo/echo"), { authorization: "Bearer sk-rh-xxxxxxxxxxxx" }, "The key was refused", "guide's placeholder"],
    ["unexpanded variable", "/v1/responses", body("demo/echo"), { authorization: "Bearer $POMEX_API_KEY" }, "The key was refused", "the shell did not expand it"],
    ["another provider's key", "/v1/responses", body("demo/echo"), { authorization: "Bearer sk-ant-1234" }, "The key was refused", "another provider's key"],
    ["missing /v1", "/responses", body("demo/echo"), {}, "base_url is wrong", "base_url must end with /v1"],
    ["an API of Ollama", "/api/chat", "{}", {}, "Another API was asked", "OpenAI-compatible provider"],
    ["Claude Code's address with /v1", "/v1/v1/messages", "{}", {}, "base_url is wrong", "ANTHROPIC_BASE_URL must be"],
    ["wrong model", "/v1/responses", body("demo/ecko"), {}, "The request was refused", "Did you mean demo/echo"],
    ["hostile model and User-Agent", "/v1/responses", body(EVIL), { "user-agent": EVIL }, "The request was refused", EVIL],
  ]) await check("set-up names within three seconds: " + name, async () => { await call("POST", path, text, headers); return seen(title, cure); });
  await check("set-up names within three seconds: WebSocket attempt", async () => {
    await call("GET", "/v1/responses", undefined, { upgrade: "websocket", connection: "Upgrade" }).catch(() => 0); return seen("A WebSocket was tried", "wire_api"); });
  await check("set-up waits for a client, whatever the playground asks", async () => {
    await call("POST", "/v1/responses", JSON.stringify({ model: "demo/echo", input: "hi", stream: true }), { "user-agent": "Mozilla/5.0" });
    await page.waitForTimeout(1500);
    return (await page.textContent("#main")).includes("Waiting for the first request…"); });
  await check("set-up turns green with the first request", async () => {
    await call("POST", "/v1/responses", JSON.stringify({ model: "demo/echo", input: "hi", stream: true }), { originator: "codex_exec", "user-agent": "codex_exec/0.128.0" });
    await page.waitForSelector("text=A request was received", { timeout: 3000 });
    return (await page.textContent("#main")).includes("Its stream ended with response.completed"); });
  await check("set-up shows a request in flight, and that its client left", async () => {
    const q = http.request(base + "/v1/responses", { method: "POST", headers: { authorization: "Bearer " + apiKey, "content-type": "application/json",
      originator: "codex_exec", "user-agent": "codex_exec/0.128.0" } });
    q.on("error", () => 0); q.end(JSON.stringify({ model: "demo/slow", input: "hi", stream: true }));
    await page.waitForSelector("text=A request is in flight", { timeout: 2000 }); q.destroy();
    await page.waitForSelector("text=The client left", { timeout: 3000 }); });
  await check("nothing hostile became an element", async () => await page.$$eval("#main img", x => x.length) === 0);
  // keys, by keyboard alone
  await go("keys");
  let created = "";
  await check("a key is created, copied and put away without a mouse", async () => {
    await page.focus("input[name=name]"); await page.keyboard.type("walker"); await page.keyboard.press("Tab"); await page.keyboard.type("1.5");
    await page.keyboard.press("Enter"); await page.waitForSelector("#kv"); created = await page.textContent("#kv");
    await page.waitForFunction(() => document.activeElement.id === "copykey"); await page.keyboard.press("Enter"); await page.waitForTimeout(100);
    const copied = await page.evaluate(() => navigator.clipboard.readText()); if (copied !== created) return "copied " + copied;
    for (let i = 0; i < 3 && !(await page.evaluate(() => document.activeElement.name === "agent")); i++) await page.keyboard.press("Tab");
    for (let i = 0; i < 9 && !(await page.textContent("pre.code")).includes("export POMEX_API_KEY=\"" + created); i++) await page.keyboard.press("ArrowDown");
    if (!(await page.textContent("pre.code")).includes(created)) return "no choice by arrows"; });
  await check("no agent's settings hold the key, all name the gateway", async () => {
    const agents = await page.$$eval("select[name=agent] option", all => all.map(each => each.value));
    if (agents.join() !== "codex,claude-code,opencode,qwen-code,aider,cline,continue,Shell,curl") return agents.join();
    for (const agent of agents.slice(0, 7)) { await page.selectOption("select[name=agent]", agent); const t = await page.textContent("pre.code");
      if (t.includes(created) || !t.includes(base) || !t.includes("POMEX_API_KEY")) return agent; }
    await page.selectOption("select[name=agent]", "codex"); });
  await check("leaving with an unstored key asks once", async () => { await page.click("#nav a[data-id=usage]"); await page.waitForSelector("dialog[open]");
    await page.click("dialog >> text=Back to the key"); return (await page.$("#kv")) !== null; });
  await check("the waiting step sees the first request of the key", async () => {
    await call("POST", "/v1/responses", JSON.stringify({ model: "demo/echo", input: "hi", stream: true }), { authorization: "Bearer " + created, "user-agent": "codex/9" });
    await page.waitForSelector("text=First request received: completed", { timeout: 4000 }); });
  await check("a wrong budget is told at its field", async () => { await page.click("text=I have stored it"); await page.fill("input[name=name]", "other");
    await page.fill("input[name=budget]", "many"); await page.keyboard.press("Enter"); await page.waitForSelector("#f-budget[aria-invalid]");
    return (await page.textContent("#f-budget-error")).includes("amount"); });
  await check("a name that is taken is told at its field", async () => { await page.fill("input[name=name]", "walker"); await page.fill("input[name=budget]", "");
    await page.keyboard.press("Enter"); await page.waitForSelector("#f-name[aria-invalid]"); });
  await check("edit keeps what is not touched", async () => { await page.click("[aria-label='Edit key walker']"); await page.fill("dialog input[name=rpm]", "7");
    await page.click("dialog >> text=Save"); await page.waitForSelector("dialog", { state: "detached" });
    const k = await page.evaluate(async () => (await (await fetch("/admin/api/keys")).json()).keys.find(k => k.name === "walker"));
    return k.rpm === 7 && k.budget_nanos === 1500000000 && k.period === "month" || JSON.stringify(k); });
  await check("Escape closes a dialog and focus returns", async () => { await page.focus("[aria-label='Revoke key walker']"); await page.keyboard.press("Enter");
    await page.waitForSelector("dialog[open]"); await page.keyboard.press("Escape"); await page.waitForSelector("dialog", { state: "detached" });
    return page.evaluate(() => document.activeElement.getAttribute("aria-label") === "Revoke key walker"); });
  await check("a revoked key is refused and named", async () => { await page.click("[aria-label='Revoke key walker']"); await page.click("dialog >> text=/^Revoke$/");
    await page.waitForSelector("dialog", { state: "detached" });
    const r = await call("POST", "/v1/responses", body("demo/echo"), { authorization: "Bearer " + created });
    await go("setup"); return r.status === 401 && (await seen("The key was refused", "Key walker was revoked")); });
  await check("an account's statement has its credit and charges, and those of earlier months", async () => {
    await go("keys"); await page.click("[aria-label='Add credit to default']"); await page.fill("dialog input[name=amount]", "20"); await page.click("dialog >> text=/^Add credit$/");
    await page.waitForSelector("dialog", { state: "detached" }); await page.focus("[aria-label='Statement of default']"); await page.keyboard.press("Enter");
    await page.waitForSelector("dialog >> text=top-up"); const cells = rows => page.$$eval("dialog " + rows, all => all.map(tr => [...tr.cells].map(td => td.textContent).join()));
    const [month, charges, balance] = [await page.$eval("dialog select", each => each.value), await cells("tbody tr"), await cells("tfoot tr")];
    await page.selectOption("dialog select", { index: 1 }); await page.waitForSelector("dialog >> text=top-up", { state: "detached" });
    const before = await cells("tr"); await page.keyboard.press("Escape"); await page.waitForSelector("dialog", { state: "detached" });
    return month === new Date().toISOString().slice(0, 7) && charges.some(row => row.startsWith("demo/echo,")) && balance[0] === "Balance before,,,$0"
      && /^20..-..-.. top-up ,,,\$20.00$/.test(balance[1]) && balance[3] === "Balance after,,,$20.00" && before.at(-1) === "Balance after,,,$0"
      && await page.evaluate(() => document.activeElement.getAttribute("aria-label")) === "Statement of default" || [month, charges, balance, before].join("; "); });
  await check("the audit log names what was changed and who did it, the newest first, and no key", async () => {
    await go("audit"); await page.waitForSelector("tbody tr"); const rows = await page.$$eval("tbody tr", all => all.map(tr => tr.textContent));
    const at = what => rows.findIndex(row => row.includes(what) && /session \d+ from 127.0.0.1/.test(row));
    const order = ["key revoked walker", "key edited walker", "key created walker"].map(at);
    return order[0] >= 0 && order[0] < order[1] && order[1] < order[2] && !rows.join().includes(created) || rows.join(); });
  // playground
  await go("playground");
  await check("the playground shows typed events and the answer", async () => { await page.fill("textarea[name=input]", EVIL); await page.click("text=Send");
    await page.waitForSelector("text=response.completed after", { timeout: 5000 }); await page.waitForSelector("text=Show the request", { timeout: 5000 });
    return (await page.textContent(".out")).includes(EVIL) && (await page.textContent(".ev")).includes("response.output_text.delta"); });
  const clipboard = () => page.evaluate(() => navigator.clipboard.readText());
  await check("tools that are no JSON are told at their field, and the request is copied as curl, Codex and Python", async () => {
    await page.fill("textarea[name=tools]", "["); await page.click("[aria-label='Copy as curl']"); await page.waitForSelector("#f-tools-error >> text=JSON");
    await page.fill("textarea[name=tools]", '[{"type": "function", "name": "f", "strict": false, "parameters": null}]');
    await page.fill("textarea[name=input]", 'Is "it\'s true" null?');
    for (const name of ["curl", "Codex", "Python"]) {
      await page.click(`[aria-label='Copy as ${name}']`); await page.waitForTimeout(100); copied[name] = await clipboard(); } });
  await check("the request stands in the log with its detail", async () => { await page.click("text=Show the request");
    await page.waitForSelector("text=Terminal event"); return (await page.textContent("#main")).includes("response.completed"); });
  await check("a request is copied as curl, without its prompt", async () => { await page.click("text=Copy as curl"); await page.waitForTimeout(100);
    const text = await clipboard(); return text.includes("curl -N " + base + "/v1/responses") && text.includes('{"model":"demo/echo","input":"…","stream":true}') || text; });
  await go("providers");
  await check("a provider is disabled and enabled again, and stays what it is over a test", async () => {
    const ask = async () => (await call("POST", "/v1/responses", body("demo/echo"))).status, seen = [await ask()];
    await page.click("text=/^Disable$/"); await page.waitForSelector("text=No new request goes there"); seen.push(await ask());
    await page.click("text=Test now"); await page.waitForSelector("text=The demo works offline"); await page.waitForSelector(".tag >> text=disabled");
    await go("models"); seen.push(await page.textContent("tbody tr .tag")); await go("providers");
    await page.click("text=/^Enable$/"); await page.waitForSelector("text=/^Disable$/"); seen.push(await ask());
    return seen.join() === "200,400,disabled,200" || seen.join(); });
  await check("a panel that fails says why and offers to try again", async () => {
    await page.route("**/admin/api/models", r => r.fulfill({ status: 404, json: { error: { message: "The ledger is locked." } } }));
    await go("models"); await page.waitForSelector("[role=alert] >> text=The ledger is locked."); await page.unroute("**/admin/api/models");
    await page.click("text=Retry"); await page.waitForSelector("tbody >> text=demo/echo"); });
  await check("the overview says what a failing provider said last", async () => {
    await Promise.all(Array.from({ length: 25 }, () => call("POST", "/v1/responses", body("demo/error"))));
    await go("setup"); await go("overview"); await page.waitForSelector(".note >> text=/^demo: .*The demo provider fails on purpose/", { timeout: 3000 }); });
  await check("a live feed that breaks is opened again", async () => {
    await go("overview"); await page.route("**/admin/api/events", r => r.fulfill({ status: 404 })); await page.reload(); await page.waitForSelector("#live >> text=Reconnecting");
    await page.unroute("**/admin/api/events"); await page.waitForSelector("#live >> text=Live", { timeout: 6000 }); });
  await check("older requests follow on demand, once", async () => {
    for (let i = 0; i < 55; i++) await call("POST", "/v1/responses", body("demo/echo"));
    await go("usage"); await page.waitForTimeout(2500); await page.click("text=Show older"); await page.waitForSelector("text=Show older", { state: "detached" });
    const ids = await page.$$eval("tbody a.name", all => all.map(a => a.hash)); return ids.length > 55 && new Set(ids).size === ids.length || ids.length; });
  await check("the last 24 hours are a choice of the usage log", async () => { await go("usage"); await page.selectOption("select[name=time]", { label: "last 24 hours" });
    await page.waitForSelector("tbody >> text=demo/echo"); const asked = page.waitForRequest(/api.usage\?from=/); await page.reload();
    return page.url().endsWith("#usage?time=1d") && Math.abs(Date.now() - 864e5 - new URL((await asked).url()).searchParams.get("from")) < 5000 || page.url(); });
  await check("a name that is clipped has all of it as its title", async () => {
    const models = Array.from({ length: 15 }, (_, i) => "demo/model-" + i + "*").join(", ");
    await page.evaluate(async models => fetch("/admin/api/keys", { method: "POST", headers: { "content-type": "application/json" },
      body: JSON.stringify({ name: "patterns", models }) }), models);
    await go("keys"); const titles = await page.$$eval("#main bdi[title]", all => all.map(each => [each.title, each.textContent]));
    return titles.length === 1 && titles[0][0] === models && titles[0][1] === models.slice(0, 60) + "…" || JSON.stringify(titles); });
  await go("usage?model=nothing/here");
  await check("a filter without a match offers to clear it", async () => { await page.click("text=Clear filters"); await page.waitForSelector("tbody tr"); });
  await go("overview");
  await check("the chart has the same data as a table", async () => { await page.click("text=View as table"); return (await page.textContent("caption + thead")).includes("Time"); });
  // hostile text from everywhere at once
  await check("hostile names change nothing", async () => {
    for (const m of ["demo/" + EVIL, "demo/" + RTL, "demo/" + LONG, "demo/a\u0000b"])
      await call("POST", "/v1/responses", body(m), { "user-agent": EVIL });
    for (const r of ["overview", "keys", "usage", "models", "providers", "setup", "usage/" + encodeURIComponent(EVIL), "usage?key=" + encodeURIComponent(EVIL)]) await go(r);
    return await page.$$eval("img,iframe,script[src]", x => x.length) === 0; });
  // every route, both themes, two widths
  const id = await page.evaluate(async () => (await (await fetch("/admin/api/usage?limit=1")).json()).rows[0].response_id);
  const routes = ["overview", "keys", "usage", "usage/" + id, "models", "providers", "audit", "playground", "setup"];
  const looser = await browser.newContext({ bypassCSP: true, storageState: await context.storageState() });
  const other = watch(await looser.newPage(), base);
  for (const scheme of ["light", "dark"]) for (const width of [1280, 390]) for (const r of routes) {
    const name = r.replace(/\/.*/, "-one") + "-" + scheme + "-" + width;
    await other.setViewportSize({ width, height: width > 500 ? 900 : 844 }); await other.emulateMedia({ colorScheme: scheme });
    await other.goto("about:blank"); await other.goto(base + "/admin#" + r); await other.waitForTimeout(300);
    if (shots) await other.screenshot({ path: shots + "/" + name + ".png", fullPage: true });
    if (await other.evaluate(() => document.documentElement.scrollWidth > innerWidth)) faults.push("sideways scroll: " + name);
    await other.addScriptTag({ content: axe });
    const look = async place => { for (const v of await other.evaluate(async () => (await axe.run()).violations.map(v => v.id + ": " + v.nodes[0].html.slice(0, 160))))
      violations.push(place + " " + v); };
    await look(name);
    if (r !== "keys") continue;
    await other.click("[aria-label='Statement of default']"); await other.waitForSelector("dialog >> text=Balance after"); await look("statement " + name);
    if (shots) await other.screenshot({ path: shots + "/statement-" + scheme + "-" + width + ".png" });
  }
  for (const r of routes) { await go(r); for (const width of [390, 761, 900, 1024, 1600]) { await page.setViewportSize({ width, height: 900 });
    if (await page.evaluate(() => document.documentElement.scrollWidth > innerWidth)) faults.push("sideways scroll: " + r + " " + width); } }
  // the holder's view
  await check("logging out ends the session", async () => { await page.click("text=Log out"); await page.waitForSelector("input[name=token]");
    return page.evaluate(async () => (await fetch("/admin/api/keys")).status === 401); });
  await check("an API key opens its holder's view, and no more", async () => { await page.fill("input[name=token]", apiKey); await page.keyboard.press("Enter");
    await page.waitForSelector("#nav"); const t = await page.textContent("#nav");
    const s = await page.evaluate(async () => [(await fetch("/admin/api/keys")).status, (await fetch("/admin/api/providers")).status,
      (await fetch("/admin/api/audit")).status, [...new Set((await (await fetch("/admin/api/usage?limit=500")).json()).rows.map(r => r.key))].join()]);
    return !/Keys|Providers|Audit/.test(t) && s[0] === 403 && s[1] === 403 && s[2] === 403 && s[3] === "walkers-own" || t + s; });
  await other.goto("about:blank"); await looser.clearCookies(); await other.goto(base + "/admin"); await other.waitForSelector("input[name=token]");
  await other.addScriptTag({ content: axe });
  for (const v of await other.evaluate(async () => (await axe.run()).violations.map(v => v.id))) violations.push("login " + v);
  console.log(JSON.stringify({ checks, copied, axe: violations, faults }));
  await browser.close();
})().catch(e => { console.log(JSON.stringify({ checks, copied, axe: violations, faults: [...faults, String(e.stack)] })); process.exit(1); });
