//! Content-defined chunking for the backup repository.
//!
//! A file is cut where a rolling hash of the last 64 bytes has its low bits all
//! zero. Inserting a byte near the beginning therefore moves at most a chunk or
//! two; the rest is found to be stored already.

use std::io::{self, ErrorKind, Read};

const WINDOW: usize = 64;

/// Parameters of a repository. They are written into its configuration when it
/// is created: changing them later would make every chunk look new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Params {
    pub min: usize,
    pub max: usize,
    /// Average size as a power of two.
    pub bits: u32,
    /// Secret of the repository. Without it, the lengths of the chunks would
    /// tell an onlooker which well-known files are in the backup.
    pub seed: u64,
}

impl Params {
    pub fn validate(&self) -> Result<(), String> {
        let average = 1usize
            .checked_shl(self.bits)
            .ok_or_else(|| format!("{} bits are too many", self.bits))?;
        if self.min < WINDOW {
            return Err(format!("minimum chunk size is {WINDOW} bytes"));
        }
        if !(self.min < average && average < self.max) {
            return Err(format!(
                "need min < average < max, got {} < {average} < {}",
                self.min, self.max
            ));
        }
        Ok(())
    }
}

impl Default for Params {
    fn default() -> Self {
        Params { min: 512 << 10, max: 8 << 20, bits: 20, seed: 0 }
    }
}

/// Random-looking numbers for the 256 byte values, derived from the seed.
fn table(seed: u64) -> [u64; 256] {
    let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
    let mut out = [0; 256];
    for slot in &mut out {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        *slot = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
    }
    out
}

/// An iterator over the chunks of a reader.
pub struct Chunker<R> {
    reader: R,
    params: Params,
    table: [u64; 256],
    mask: u64,
    buf: Vec<u8>,
    start: usize,
    eof: bool,
}

impl<R: Read> Chunker<R> {
    pub fn new(reader: R, params: Params) -> Self {
        debug_assert!(params.validate().is_ok());
        Chunker {
            reader,
            table: table(params.seed),
            mask: (1 << params.bits) - 1,
            buf: Vec::with_capacity(2 * params.max),
            start: 0,
            eof: false,
            params,
        }
    }

    /// Fills the buffer until it holds one chunk of maximal size.
    fn fill(&mut self) -> io::Result<()> {
        if self.buf.len() - self.start >= self.params.max || self.eof {
            return Ok(());
        }
        self.buf.drain(..self.start);
        self.start = 0;
        while self.buf.len() < self.params.max {
            let old = self.buf.len();
            self.buf.resize(2 * self.params.max, 0);
            let got = self.reader.read(&mut self.buf[old..]);
            let n = match got {
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {
                    self.buf.truncate(old);
                    continue;
                }
                Err(e) => {
                    self.buf.truncate(old);
                    return Err(e);
                }
            };
            self.buf.truncate(old + n);
            if n == 0 {
                self.eof = true;
                break;
            }
        }
        Ok(())
    }

    fn cut(&self, data: &[u8]) -> usize {
        let Params { min, max, .. } = self.params;
        if data.len() <= min {
            return data.len();
        }
        let end = data.len().min(max);

        // The hash depends on the window alone, so that it may as well start
        // just before the first place where a cut is allowed.
        let mut hash = 0u64;
        for &b in &data[min - WINDOW..min] {
            hash = hash.rotate_left(1) ^ self.table[b as usize];
        }
        for i in min..end {
            if hash & self.mask == 0 {
                return i;
            }
            // 64 rotations by one bit are the identity: the byte that leaves
            // the window can be cancelled without any further rotation.
            hash = hash.rotate_left(1)
                ^ self.table[data[i] as usize]
                ^ self.table[data[i - WINDOW] as usize];
        }
        end
    }
}

impl<R: Read> Iterator for Chunker<R> {
    type Item = io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Err(e) = self.fill() {
            return Some(Err(e));
        }
        let rest = &self.buf[self.start..];
        if rest.is_empty() {
            return None;
        }
        let n = self.cut(rest);
        let chunk = rest[..n].to_vec();
        self.start += n;
        Some(Ok(chunk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Params = Params { min: 128, max: 4096, bits: 9, seed: 7 };

    fn noise(n: usize) -> Vec<u8> {
        let mut x = 1u32;
        (0..n)
            .map(|_| {
                x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (x >> 24) as u8
            })
            .collect()
    }

    fn chunks(data: &[u8]) -> Vec<Vec<u8>> {
        Chunker::new(data, SMALL).map(Result::unwrap).collect()
    }

    #[test]
    fn chunks_add_up_to_the_input() {
        let data = noise(100_000);
        assert_eq!(chunks(&data).concat(), data);
    }

    #[test]
    fn sizes_are_within_bounds() {
        let all = chunks(&noise(100_000));
        let (last, others) = all.split_last().unwrap();
        assert!(others.iter().all(|c| (SMALL.min..=SMALL.max).contains(&c.len())));
        assert!(last.len() <= SMALL.max);
    }

    #[test]
    fn an_insertion_disturbs_few_chunks() {
        let before = noise(100_000);
        let mut after = before.clone();
        after.insert(500, b'!');
        let old = chunks(&before);
        let fresh = chunks(&after).into_iter().filter(|c| !old.contains(c)).count();
        assert!(fresh <= 3, "{fresh} chunks changed");
    }

    #[test]
    fn empty_input_has_no_chunks() {
        assert!(chunks(b"").is_empty());
    }
}
