// Calls each method of the openai package for videos, images, files, models and batches. Argument: base URL with /v1.
import fs from 'node:fs';
import OpenAI, { toFile } from 'openai';

const client = new OpenAI({ apiKey: 'none', baseURL: process.argv[2], maxRetries: 0, timeout: 60_000 });
const image = () => fs.createReadStream(`${process.env.ROOT}/examples/faces/ada.png`);
const body = { prompt: 'a boat', size: '720x1280', seconds: '4', extra_body: { upscale: false } };
let checks = 0;

async function check(name, call) {
  checks += 1;
  try {
    const problem = await call();
    if (problem) console.log(`DIFFERENCE ${name}: ${problem}`);
  } catch (error) {
    console.log(`DIFFERENCE ${name}: ${String(error.message ?? error).slice(0, 300)}`);
  }
}
const expect = (condition, problem) => (condition ? undefined : problem);
async function all(pages) {
  const found = [];
  for await (const each of pages) found.push(each);
  return found;
}
async function ended(retrieve, running) {
  for (;;) {
    const found = await retrieve();
    if (!running.includes(found.status)) return found;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

let model, video, file, batch;
await check('models.list', async () => {
  const models = await all(client.models.list());
  model = models[0]?.id;
  return expect(models.length > 1, `${models.length} models`);
});
await check('models.retrieve', async () => expect((await client.models.retrieve(model)).id === model, 'another id'));
await check('videos.create', async () => {
  video = await client.videos.create({ ...body, model });
  return expect(video.object === 'video' && video.size === body.size && video.seconds === body.seconds, JSON.stringify(video));
});
await check('videos.create with input_reference', async () => {
  const created = await client.videos.create({ ...body, model, input_reference: await toFile(image(), 'ada.png', { type: 'image/png' }) });
  return expect((await client.videos.delete(created.id)).deleted, 'not deleted');
});
await check('videos.retrieve', async () => {
  const found = await ended(() => client.videos.retrieve(video.id), ['queued', 'in_progress']);
  return expect(found.status === 'completed' && found.progress === 100, JSON.stringify(found));
});
await check('videos.downloadContent', async () => {
  const content = Buffer.from(await (await client.videos.downloadContent(video.id)).arrayBuffer());
  return expect(content.subarray(4, 8).toString() === 'ftyp', 'not an MP4 file');
});
for (const variant of ['thumbnail', 'spritesheet']) {
  await check(`videos.downloadContent ${variant}`, async () => {
    const type = (await client.videos.downloadContent(video.id, { variant })).headers.get('content-type');
    return expect(type?.startsWith('image/'), type);
  });
}
await check('videos.list over pages', async () => {
  const ids = new Set((await Promise.all([1, 2, 3].map(() => client.videos.create({ ...body, model })))).map((each) => each.id));
  const created = [...ids];
  for (const each of await all(client.videos.list({ limit: 1 }))) ids.delete(each.id);
  for (const id of created) await client.videos.delete(id);
  return expect(ids.size === 0, `${ids.size} of 3 videos are in no page`);
});
await check('videos.remix', async () => {
  const remix = await client.videos.remix(video.id, { prompt: 'a ship' });
  await client.videos.delete(remix.id);
  return expect(remix.remixed_from_video_id === video.id, 'no source');
});
for (const [name, fields] of Object.entries({ edit: {}, extend: { seconds: '4' } })) {
  await check(`videos.${name}`, async () => {
    const changed = await client.videos[name]({ video: { id: video.id }, prompt: 'at night', ...fields });
    await client.videos.delete(changed.id);
  });
}
await check('videos.createCharacter', async () => {
  const content = Buffer.from(await (await client.videos.downloadContent(video.id)).arrayBuffer());
  const character = await client.videos.createCharacter({ name: 'Ada', video: await toFile(content, 'ada.mp4', { type: 'video/mp4' }) });
  return expect((await client.videos.getCharacter(character.id)).name === 'Ada', 'another name');
});
await check('videos.delete', async () => expect((await client.videos.delete(video.id)).deleted, 'not deleted'));
await check('videos.retrieve, deleted', async () => {
  const error = await client.videos.retrieve(video.id).catch((each) => each);
  return expect(error instanceof OpenAI.NotFoundError && error.code, `${error.constructor.name} ${error.code}`);
});
await check('images.generate', async () => {
  const found = await client.images.generate({ model, prompt: 'a boat', size: '1024x1024', n: 2 });
  return expect(found.data.length === 2 && found.data[0].b64_json, JSON.stringify(found).slice(0, 200));
});
await check('images.generate, stream', async () => {
  const events = await all(await client.images.generate({ model, prompt: 'a boat', size: '1024x1024', stream: true, partial_images: 1 }));
  return expect(events.at(-1)?.type === 'image_generation.completed', events.map((each) => each.type).join());
});
await check('images.edit', async () => {
  const found = await client.images.edit({ model, prompt: 'at night', image: await toFile(image(), 'ada.png', { type: 'image/png' }) });
  return expect(found.data.length === 1, `${found.data.length} images`);
});
await check('images.createVariation', async () => {
  const found = await client.images.createVariation({ image: await toFile(image(), 'ada.png', { type: 'image/png' }) });
  return expect(found.data.length === 1, `${found.data.length} images`);
});
await check('files.create', async () => {
  const line = (seed) => JSON.stringify({ custom_id: `${seed}`, method: 'POST', url: '/v1/videos', body: { prompt: 'a boat', size: '128x64', seconds: '1', seed } });
  file = await client.files.create({ file: await toFile(Buffer.from([1, 2].map(line).join('\n')), 'boats.jsonl'), purpose: 'batch' });
  return expect(file.purpose === 'batch' && file.filename === 'boats.jsonl', JSON.stringify(file));
});
await check('files.retrieve', async () => expect((await client.files.retrieve(file.id)).bytes === file.bytes, 'other bytes'));
await check('files.content', async () => expect((await (await client.files.content(file.id)).text()).length === file.bytes, 'other bytes'));
await check('files.list over pages', async () => {
  await client.files.create({ file: await toFile(Buffer.from('{}'), 'other.jsonl'), purpose: 'batch' });
  return expect((await all(client.files.list({ limit: 1 }))).length > 1, 'one page');
});
await check('batches.create', async () => {
  batch = await client.batches.create({ input_file_id: file.id, endpoint: '/v1/videos', completion_window: '24h', metadata: { set: 'a' } });
  return expect(batch.object === 'batch' && batch.metadata.set === 'a', JSON.stringify(batch));
});
await check('batches.retrieve', async () => {
  const found = await ended(() => client.batches.retrieve(batch.id), ['validating', 'in_progress', 'finalizing']);
  const lines = (await (await client.files.content(found.output_file_id)).text()).trim().split('\n');
  return expect(found.request_counts.completed === 2 && lines.length === 2, JSON.stringify(found));
});
await check('batches.cancel', async () => {
  const other = await client.batches.create({ input_file_id: file.id, endpoint: '/v1/videos', completion_window: '24h' });
  const cancelling = await client.batches.cancel(other.id);
  await ended(() => client.batches.retrieve(other.id), ['cancelling']);
  return expect(['cancelling', 'cancelled'].includes(cancelling.status), cancelling.status);
});
await check('batches.list over pages', async () => expect((await all(client.batches.list({ limit: 1 }))).length > 1, 'one page'));
await check('files.delete', async () => expect((await client.files.delete(file.id)).deleted, 'not deleted'));
console.log(`SUMMARY ${checks} checks`);
