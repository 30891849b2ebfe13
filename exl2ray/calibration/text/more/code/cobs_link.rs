//! Framing for the balloon payload's radio link: COBS with a CRC, `no_std`, no allocation.
//!
//! A frame on the air is `cobs(type | sequence | body | crc16-be) 0x00`. The zero byte never occurs
//! inside a frame, so a receiver that wakes up in the middle of one is back in step at the next zero.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

/// Longest body; keeps a frame below 254 bytes, where COBS costs exactly one byte.
pub const MAX_BODY: usize = 240;
const OVERHEAD: usize = 4;
const MAX_RAW: usize = MAX_BODY + OVERHEAD;
/// Raw bytes, the COBS code byte, the delimiter.
pub const MAX_WIRE: usize = MAX_RAW + 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Telemetry = 0x10,
    Position = 0x11,
    Text = 0x20,
    CutDown = 0x7e,
}

impl TryFrom<u8> for Kind {
    type Error = Fault;

    fn try_from(b: u8) -> Result<Self, Fault> {
        Ok(match b {
            0x10 => Self::Telemetry,
            0x11 => Self::Position,
            0x20 => Self::Text,
            0x7e => Self::CutDown,
            other => return Err(Fault::UnknownKind(other)),
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    TooLong,
    TooShort,
    Crc,
    Stuffing,
    UnknownKind(u8),
}

/// CRC-16 with polynomial 0x1021, start value 0xffff, no reflection.
pub const fn crc16(data: &[u8]) -> u16 {
    let mut crc = 0xffffu16;
    let mut i = 0;
    while i < data.len() {
        crc ^= (data[i] as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 != 0 { crc << 1 ^ 0x1021 } else { crc << 1 };
            bit += 1;
        }
        i += 1;
    }
    crc
}

const _: () = assert!(crc16(b"123456789") == 0x29b1);

/// Writes one frame including the delimiter and returns its length.
pub fn encode(kind: Kind, seq: u8, body: &[u8], wire: &mut [u8; MAX_WIRE]) -> Result<usize, Fault> {
    if body.len() > MAX_BODY {
        return Err(Fault::TooLong);
    }
    let mut raw = [0u8; MAX_RAW];
    let n = body.len() + 2;
    raw[0] = kind as u8;
    raw[1] = seq;
    raw[2..n].copy_from_slice(body);
    let crc = crc16(&raw[..n]);
    raw[n..n + 2].copy_from_slice(&crc.to_be_bytes());

    let mut code_at = 0;
    let mut out = 1;
    for &b in &raw[..n + 2] {
        if b == 0 {
            wire[code_at] = (out - code_at) as u8;
            code_at = out;
        } else {
            wire[out] = b;
        }
        out += 1;
    }
    wire[code_at] = (out - code_at) as u8;
    wire[out] = 0;
    Ok(out + 1)
}

#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    pub kind: Kind,
    pub seq: u8,
    pub body: &'a [u8],
}

/// Unstuffs while receiving, one byte at a time, straight from the UART interrupt's queue.
pub struct Decoder {
    raw: [u8; MAX_RAW],
    len: usize,
    /// Bytes until the next code byte; 0 means the next byte is one.
    left: u8,
    /// A zero is due before the next data byte, unless the frame ends first.
    owed: bool,
    bad: Option<Fault>,
    pub counters: Counters,
}

#[derive(Default, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    pub good: u32,
    pub damaged: u32,
    pub missed: u32,
    last_seq: Option<u8>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { raw: [0; MAX_RAW], len: 0, left: 0, owed: false, bad: None, counters: Counters::default() }
    }
}

impl Decoder {
    /// `None`: go on. `Some(Err)`: a frame ended and was useless.
    pub fn push(&mut self, byte: u8) -> Option<Result<Frame<'_>, Fault>> {
        if byte == 0 {
            return self.finish();
        }
        if self.bad.is_some() {
            return None;
        }
        if self.left == 0 {
            if self.owed {
                self.store(0);
            }
            self.left = byte - 1;
            self.owed = byte != 0xff;
        } else {
            self.store(byte);
            self.left -= 1;
        }
        None
    }

    fn store(&mut self, b: u8) {
        match self.raw.get_mut(self.len) {
            Some(slot) => {
                *slot = b;
                self.len += 1;
            }
            None => self.bad = Some(Fault::TooLong),
        }
    }

    fn finish(&mut self) -> Option<Result<Frame<'_>, Fault>> {
        let len = core::mem::take(&mut self.len);
        let left = core::mem::take(&mut self.left);
        let started = core::mem::take(&mut self.owed) || len > 0;
        let bad = self.bad.take();
        if !started && bad.is_none() {
            return None; // idle zeros between frames
        }
        let verdict = match bad {
            Some(f) => Err(f),
            None if left != 0 => Err(Fault::Stuffing),
            None if len < OVERHEAD => Err(Fault::TooShort),
            // CRC over data followed by its own CRC leaves nothing.
            None if crc16(&self.raw[..len]) != 0 => Err(Fault::Crc),
            None => Kind::try_from(self.raw[0]),
        };
        let kind = match verdict {
            Ok(k) => k,
            Err(f) => {
                self.counters.damaged += 1;
                return Some(Err(f));
            }
        };
        let seq = self.raw[1];
        if let Some(last) = self.counters.last_seq.replace(seq) {
            self.counters.missed += u32::from(seq.wrapping_sub(last).wrapping_sub(1));
        }
        self.counters.good += 1;
        Some(Ok(Frame { kind, seq, body: &self.raw[2..len - 2] }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(d: &mut Decoder, bytes: &[u8]) -> Vec<Result<(Kind, u8, Vec<u8>), Fault>> {
        bytes.iter().filter_map(|&b| d.push(b).map(|r| r.map(|f| (f.kind, f.seq, f.body.to_vec())))).collect()
    }

    #[test]
    fn zeros_everywhere_survive() {
        let body = [0, 0, 7, 0, 255, 0];
        let mut wire = [0u8; MAX_WIRE];
        let n = encode(Kind::Position, 0, &body, &mut wire).unwrap();
        assert_eq!(wire[..n].iter().filter(|&&b| b == 0).count(), 1);
        assert_eq!(feed(&mut Decoder::default(), &wire[..n]), [Ok((Kind::Position, 0, body.to_vec()))]);
    }

    #[test]
    fn recovers_after_joining_late() {
        let mut wire = [0u8; MAX_WIRE];
        let n = encode(Kind::Text, 9, b"burst at 31240 m", &mut wire).unwrap();
        let mut air = wire[5..n].to_vec();
        air.extend_from_slice(&wire[..n]);
        let got = feed(&mut Decoder::default(), &air);
        assert_eq!(got.len(), 2);
        assert!(got[0].is_err());
        assert!(got[1].is_ok());
    }

    #[test]
    fn a_cut_down_order_with_one_flipped_bit_is_ignored() {
        let mut wire = [0u8; MAX_WIRE];
        let n = encode(Kind::CutDown, 3, &[0xc7, 0x7d], &mut wire).unwrap();
        for bit in 0..8 * (n - 1) {
            let mut w = wire;
            w[bit / 8] ^= 1 << (bit % 8);
            assert!(!feed(&mut Decoder::default(), &w[..n]).iter().any(|r| matches!(r, Ok((Kind::CutDown, ..)))));
        }
    }

    #[test]
    fn sequence_gaps_are_counted_over_the_wrap() {
        let mut d = Decoder::default();
        let mut wire = [0u8; MAX_WIRE];
        for seq in [254, 255, 2] {
            let n = encode(Kind::Telemetry, seq, &[], &mut wire).unwrap();
            feed(&mut d, &wire[..n]);
        }
        assert_eq!((d.counters.good, d.counters.missed), (3, 2));
    }
}
