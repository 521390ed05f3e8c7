// node dashboard_walks.js mouse|keyboard|empty|pictures BASE LINK FOLDER: a way through the dashboard as a person goes it, from the login link on.
// Says on standard output, one JSON object a line, how far it has come.
const { faults, open, shoot } = require("./dashboard_browser.js"), http = require("http");
const [way, base, link, folder] = process.argv.slice(2);
const tell = found => console.log(JSON.stringify(found));
const must = (holds, sentence) => { if (!holds) throw new Error(sentence); };
const clipboard = page => page.evaluate(() => navigator.clipboard.readText());
const heading = (page, text) => page.waitForFunction(t => document.querySelector("h1")?.textContent === t, text, { timeout: 3000 });

// How long after the event of a row's <time> the page showed it: both are clocks of this machine.
const shownAfter = (page, selector) => page.waitForFunction(s => {
  const seen = [...document.querySelectorAll(s)].find(each => each.offsetParent);
  return seen && Date.now() - Date.parse(seen.querySelector("time").dateTime) + 1; }, selector, { timeout: 30000, polling: 20 })
  .then(async found => await found.jsonValue() - 1);

async function mouse(page) {
  await page.click("#nav >> text=Keys"); await heading(page, "Keys");
  await page.fill("input[name=name]", "laptop"); await page.click("text=/^Create key$/");
  await page.click(".two .tb >> text=Copy");
  const block = await clipboard(page);
  must(block === (await page.textContent("pre.code")).trim(), "the block that was copied is not the one that is shown: " + block);
  await page.click("#copykey"); const key = await clipboard(page);
  must(key === await page.textContent("#kv"), "the key that was copied is not the one that is shown");
  await page.click("text=I have stored it"); await page.waitForSelector("#kv", { state: "detached" });

  await page.click("#nav >> text=Setup"); await page.waitForSelector("text=Waiting for the first request…");
  await page.evaluate(() => window.sameDocument = true);
  tell({ block, key });                                 // now Codex is run
  const greenMs = await shownAfter(page, "ol.steps li:nth-child(4):has(.done)");
  await page.waitForSelector("ol.steps li:nth-child(5):has(.done)");
  const steps = await page.$$eval("ol.steps li", all => all.map(li => li.textContent));
  must(await page.evaluate(() => window.sameDocument), "the set-up page was loaded anew");

  await page.click("#nav >> text=Usage log"); await page.click("tbody >> text=demo/echo"); await heading(page, "Request");
  await page.waitForSelector("text=Tokens and cost");
  const detail = await page.textContent("#main");
  await page.click("text=Back to the log"); await page.waitForSelector("tbody tr");
  const row = await page.textContent("tbody tr");
  await page.click("#nav >> text=Overview"); await page.waitForSelector("text=Latest requests");
  const endpoint = await page.textContent(".rows li");

  await page.click("#nav >> text=Keys"); await page.click("[aria-label='Revoke key laptop']"); await page.click("dialog >> text=/^Revoke$/");
  await page.waitForSelector("tr:has-text('laptop') >> text=revoked");
  await page.click("#nav >> text=Setup"); await page.waitForSelector("text=None. A wrong key");
  tell({ greenMs, steps, detail, row, endpoint });      // now Codex is run again
  const refusedMs = await shownAfter(page, "tbody tr");
  await page.waitForTimeout(100); await shoot(page, folder + "/setup.png", 900);
  tell({ refusedMs, refused: await page.textContent("tbody tr"), faults });
}

async function keyboard(page) {
  const press = key => page.keyboard.press(key);
  const focused = () => page.evaluate(() => {
    const e = document.activeElement, s = getComputedStyle(e), r = e.getBoundingClientRect();
    return { name: e.getAttribute("aria-label") || e.textContent.trim().slice(0, 60) || e.name, id: e.id || e.name || "", tag: e.tagName,
      ring: s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2, inView: r.bottom > 0 && r.top < innerHeight && r.width > 0 }; });
  // Presses Tab until it is there; whatever has the focus on the way must show it.
  async function reach(wanted, key = "Tab") {
    const passed = [];
    for (let i = 0; i < 60; i++) {
      await press(key);
      const at = await focused();
      if (at.tag !== "BODY" && at.id !== "main") must(at.ring && at.inView, "the focus cannot be seen: " + JSON.stringify(at));
      if (at.name === wanted || at.id === wanted) return at;
      passed.push(at.name);
    }
    throw new Error(key + " does not lead to " + wanted + ", only to " + passed.join(", "));
  }
  const onMain = async where => must((await focused()).id === "main", where + ": the focus is on " + JSON.stringify(await focused()));

  await press("Tab"); must((await focused()).name === "Skip to content", "the first stop is not the skip link: " + JSON.stringify(await focused()));
  await press("Enter"); await onMain("the skip link");
  await reach("Keys1", "Shift+Tab"); await press("Enter"); await heading(page, "Keys"); await onMain("Keys");
  await reach("name"); await page.keyboard.type("laptop"); await press("Enter");
  await page.waitForFunction(() => document.activeElement.id === "copykey"); await press("Space");
  const key = await page.textContent("#kv"); must(await clipboard(page) === key, "Space does not copy the key");
  await reach("f-agent"); for (let i = 0; i < 7; i++) await press("ArrowDown");
  must((await page.textContent("pre.code")).includes(key), "no choice by arrows");
  must((await focused()).id === "f-agent", "the choice loses the focus"); await press("Home");
  await reach("Copy"); await press("Enter");
  await page.waitForFunction(() => navigator.clipboard.readText().then(t => t.includes("model_provider")));
  must(await clipboard(page) === (await page.textContent("pre.code")).trim(), "Enter does not copy the block");
  await reach("I have stored it", "Shift+Tab"); await press("Enter");
  await page.waitForSelector("#kv", { state: "detached" }); await onMain("I have stored it");

  await new Promise((done, fail) => http.request(base + "/v1/responses", { method: "POST", headers: { authorization: "Bearer " + key,
    "content-type": "application/json" } }, r => r.resume().on("end", done)).on("error", fail).end('{"model":"demo/echo","input":"hi"}'));
  await reach("Usage log", "Shift+Tab"); await press("Enter"); await heading(page, "Usage log"); await onMain("Usage log");
  await page.waitForSelector("tbody a");
  await reach("f-time"); await press("ArrowDown"); await page.waitForFunction(() => location.hash === "#usage?time=today");
  await page.waitForSelector("tbody a"); must((await focused()).id === "f-time", "a filter loses the focus when the list is drawn");
  await reach("demo/echo"); await press("Enter"); await heading(page, "Request"); await onMain("Request");
  await page.waitForSelector("text=Tokens and cost");
  await reach("Back to the log"); await press("Enter"); await heading(page, "Usage log"); await onMain("back");

  await reach("Keys2", "Shift+Tab"); await press("Enter"); await heading(page, "Keys"); await page.waitForSelector("[aria-label='Revoke key laptop']");
  await reach("Revoke key laptop"); await press("Space"); await page.waitForSelector("dialog[open]");
  must((await focused()).name === "Keep it", "a dialog does not take the focus"); await press("Escape");
  await page.waitForSelector("dialog", { state: "detached" });
  must((await focused()).name === "Revoke key laptop", "a dialog does not give the focus back"); await press("Enter");
  await page.waitForSelector("dialog[open]"); await reach("Revoke"); await press("Enter");
  await page.waitForSelector("tr:has-text('laptop') >> text=revoked"); await onMain("a button that is gone");
  tell({ faults });
}

// A gateway without a key and without a request: every page says what to do.
async function empty(page) {
  for (const [route, sentence] of [["overview", "No request yet"], ["keys", "No keys. Create the first one"], ["usage", "No request yet"],
    ["usage?model=none", "Nothing matches"], ["usage/resp_none", "There is no such request here"], ["models", "Providers without a key"],
    ["providers", "no requests"], ["playground", "Nothing sent yet"], ["setup", "Waiting for the first request…"], ["setup", "No key yet"]]) {
    await page.goto(base + "/admin#" + route); await page.waitForSelector("text=" + sentence, { timeout: 3000 });
    if (route === "keys") await page.waitForFunction(() => document.activeElement.name === "name", null, { timeout: 1000 });
  }
  tell({ faults });
}

// The README's pictures, of what dashboard_pictures.py makes up.
async function pictures(page) {
  const picture = (name, height) => shoot(page, folder + "/" + name + ".png", height);
  tell({});                                             // now a request is made
  await page.waitForSelector(".stack >> text=team/coder", { timeout: 10000 }); await page.waitForTimeout(300);
  await picture("overview", 1160);
  await page.click(".stack >> text=team/coder"); await page.waitForSelector("text=Tokens and cost");
  const path = await page.textContent("#main");
  must(/529 overloaded, after 0\.\d+ s.*openaiDone. answered.*Before openai was called/.test(path) && path.includes("Upstream idreq_8f0c2a4e"), path);
  await picture("request", 900);
  await page.click("#nav >> text=Keys");
  await page.fill("input[name=name]", "laptop-ana"); await page.fill("input[name=budget]", "50"); await page.click("text=/^Create key$/");
  await page.waitForSelector("#kv"); await page.evaluate(() => document.activeElement.blur()); await picture("keys", 1100);
  tell({ faults });
}

(async () => {
  const { browser, page } = await open(base);
  await page.goto(link); await page.waitForSelector("#nav");
  must(page.url() === base + "/admin#overview", "the link stays in the address: " + page.url());
  await { mouse, keyboard, empty, pictures }[way](page);
  await browser.close(); process.exit(0);
})().catch(error => { tell({ error: String(error.stack).slice(0, 1500), faults }); process.exit(1); });
