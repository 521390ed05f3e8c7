// Headless Chromium for the drivers of the dashboard: one page, and whatever went wrong in it.
const { chromium } = require("playwright-core"), fs = require("fs"), zlib = require("zlib");
const faults = [];      // console errors, CSP reports, dialogs nobody expected, requests to another host

function watch(page, base) {
  page.on("console", m => { if (m.type() === "error" && !/status of 40[0-9]|status of 429/.test(m.text())) faults.push("console: " + m.text()); });
  page.on("pageerror", e => faults.push("error: " + e.stack));
  page.on("dialog", d => { if (d.type() !== "beforeunload") faults.push("dialog: " + d.message()); d.accept(); });
  page.on("request", r => { if (!r.url().startsWith(base) && !/^(data|blob|about):/.test(r.url())) faults.push("host: " + r.url()); });
  return page;
}

async function open(base) {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: ["--no-sandbox", "--disable-gpu",
    "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"] });
  const context = await browser.newContext({ permissions: ["clipboard-read", "clipboard-write"] });
  await context.addInitScript(() => addEventListener("securitypolicyviolation", e => console.error("CSP " + e.violatedDirective + " " + e.blockedURI)));
  return { browser, context, page: watch(await context.newPage(), base) };
}

// A picture with a palette of 56 colours: a third of the size, and nobody sees it.
async function shoot(page, path, height) {
  const { width } = page.viewportSize(), whole = await page.evaluate(() => document.documentElement.scrollHeight);
  const png = await page.screenshot({ animations: "disabled", fullPage: true, clip: { x: 0, y: 0, width, height: Math.min(height, whole) } });
  const blank = await page.context().newPage();
  const { size, palette, rows } = await blank.evaluate(async png => {
    const image = await createImageBitmap(new Blob([Uint8Array.from(atob(png), c => c.charCodeAt(0))])), { width, height } = image;
    const canvas = new OffscreenCanvas(width, height).getContext("2d");
    canvas.drawImage(image, 0, 0);
    const pixels = new Uint32Array(canvas.getImageData(0, 0, width, height).data.buffer), counts = new Map();
    for (const p of pixels) counts.set(p, (counts.get(p) || 0) + 1);
    const bytes = p => [p & 255, p >> 8 & 255, p >> 16 & 255], chroma = p => Math.max(...bytes(p)) - Math.min(...bytes(p));
    const weight = ([p, count]) => count * (40 + chroma(p));        // a red mark is small, and means something
    const palette = [...counts].sort((a, b) => weight(b) - weight(a)).slice(0, 56).map(each => each[0]), near = new Map(palette.map((p, i) => [p, i]));
    const far = (p, q) => bytes(p).reduce((sum, each, i) => sum + (each - bytes(q)[i]) ** 2, 0);
    const nearest = p => { if (!near.has(p)) near.set(p, palette.reduce((best, q, i) => far(p, q) < far(p, palette[best]) ? i : best, 0)); return near.get(p); };
    let rows = "";
    pixels.forEach((p, i) => rows += (i % width ? "" : "\0") + String.fromCharCode(nearest(p)));
    return { size: [width, height], palette: palette.flatMap(bytes), rows: btoa(rows) };
  }, png.toString("base64"));
  await blank.close();
  const chunk = (name, data) => { const body = Buffer.concat([Buffer.from(name), data]), all = Buffer.alloc(body.length + 8);
    all.writeUInt32BE(data.length); body.copy(all, 4); all.writeUInt32BE(crc(body), body.length + 4); return all; };
  const head = Buffer.alloc(13); head.writeUInt32BE(size[0]); head.writeUInt32BE(size[1], 4); head[8] = 8; head[9] = 3;
  fs.writeFileSync(path, Buffer.concat([Buffer.from("\x89PNG\r\n\x1a\n", "latin1"), chunk("IHDR", head), chunk("PLTE", Buffer.from(palette)),
    chunk("IDAT", zlib.deflateSync(Buffer.from(rows, "base64"), { level: 9 })), chunk("IEND", Buffer.alloc(0))]));
}

function crc(data) {
  let sum = -1;
  for (const byte of data) { sum ^= byte; for (let i = 0; i < 8; i++) sum = sum >>> 1 ^ (sum & 1 ? 0xedb88320 : 0); }
  return ~sum >>> 0;
}

module.exports = { faults, open, shoot, watch };
