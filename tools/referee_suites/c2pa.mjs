// Validates the signatures of the files that are arguments with c2pa-ts.
import fs from 'node:fs/promises';
import { BMFF, PNG } from '@trustnxt/c2pa-ts/asset';
import { SuperBox } from '@trustnxt/c2pa-ts/jumbf';
import { ManifestStore, ValidationResult } from '@trustnxt/c2pa-ts/manifest';

BMFF.canReadBrands.add('isom'); // it lists the brands of HEIF only
const files = process.argv.slice(2);
for (const file of files) {
  let result;
  try {
    const content = await fs.readFile(file);
    const asset = PNG.canRead(content) ? new PNG(content) : new BMFF(content);
    result = await ManifestStore.read(SuperBox.fromBuffer(asset.getManifestJUMBF())).validate(asset);
  } catch (error) {
    console.log(`DIFFERENCE ${file.split('/').at(-1)}: ${error.message}`);
    continue;
  }
  for (const each of result.statusEntries.filter((entry) => !entry.success)) {
    console.log(`DIFFERENCE ${file.split('/').at(-1)}: ${each.code} ${each.explanation ?? ''}`);
  }
}
console.log(`SUMMARY ${files.length} files`);
