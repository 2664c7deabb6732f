// Images by Vercel's AI SDK.
import { createOpenAI } from '@ai-sdk/openai';
import { generateImage } from 'ai';

const model = createOpenAI({ baseURL: `${process.env.URL}/v1`, apiKey: 'none' }).image('tiny');
const checks = {
  'one image': { prompt: 'a boat', size: '128x64' },
  'several images': { prompt: 'a boat', n: 3, size: '128x64' },
  'an edit': { prompt: { text: 'at night', images: [await (await import('node:fs/promises')).readFile(`${process.env.ROOT}/examples/faces/ada.png`)] } },
};
for (const [name, options] of Object.entries(checks)) {
  try {
    const { images } = await generateImage({ model, maxRetries: 0, ...options });
    if (images.length !== (options.n ?? 1) || images[0].mediaType !== 'image/png') {
      console.log(`DIFFERENCE ${name}: ${images.length} images, ${images[0]?.mediaType}`);
    }
  } catch (error) {
    console.log(`DIFFERENCE ${name}: ${error.message}`);
  }
}
console.log(`SUMMARY ${Object.keys(checks).length} checks`);
