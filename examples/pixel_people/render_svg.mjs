// SPDX-License-Identifier: Apache-2.0
// Reads one JSON object of DiceBear "pixel-art" options per line, writes one SVG per line.
import { createAvatar } from '@dicebear/core';
import * as pixelArt from '@dicebear/pixel-art';
import readline from 'node:readline';

const absent = {
  beardProbability: 0, hatProbability: 0, glassesProbability: 0, accessoriesProbability: 0,
};

for await (const line of readline.createInterface({ input: process.stdin })) {
  const svg = createAvatar(pixelArt, { seed: '', ...absent, ...JSON.parse(line) }).toString();
  // the license metadata is the same in every picture (see README.md); without it, parsing is faster
  const drawing = svg.replace(/<metadata.*?<\/metadata>/s, '').replaceAll('\n', ' ');
  if (!process.stdout.write(drawing + '\n')) {
    await new Promise((resolve) => process.stdout.once('drain', resolve));
  }
}
