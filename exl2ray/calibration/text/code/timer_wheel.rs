//! A hierarchical timer wheel for leases and connection timeouts.
//!
//! A binary heap costs `O(log n)` per timer, and almost all network timers are cancelled before
//! they fire. Here insertion and cancellation are constant time. Four wheels of 64 slots cover
//! 2^24 ticks; with a tick of 10 ms that is a little over 46 hours.
//!
//! A timer sits in the wheel whose resolution matches its distance. When the clock reaches the slot
//! of a coarse wheel, the timers in it are distributed over the finer wheels ("cascading").

use std::collections::HashMap;

const BITS: u32 = 6;
const SLOTS: usize = 1 << BITS;
const LEVELS: usize = 4;

/// Identifies one armed timer. Never reused, so a stale handle cannot cancel somebody else's timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TimerId(u64);

#[derive(Debug, PartialEq, Eq)]
pub enum ArmError {
    /// The delay exceeds what the wheels can express.
    TooFar { delay: u64, longest: u64 },
}

#[derive(Debug)]
struct Entry<T> {
    deadline: u64,
    payload: T,
}

#[derive(Debug)]
pub struct TimerWheel<T> {
    now: u64,
    next_id: u64,
    slots: Vec<Vec<TimerId>>,
    // Slots hold identifiers only. Cancelling removes the entry here and leaves a dangling
    // identifier behind, which is dropped when its slot comes up.
    entries: HashMap<TimerId, Entry<T>>,
}

impl<T> TimerWheel<T> {
    pub const LONGEST: u64 = (1 << (BITS * LEVELS as u32)) - 1;

    pub fn new() -> Self {
        TimerWheel {
            now: 0,
            next_id: 0,
            slots: (0..LEVELS * SLOTS).map(|_| Vec::new()).collect(),
            entries: HashMap::new(),
        }
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Arms a timer that fires `delay` ticks from now. A delay of zero fires on the next tick:
    /// firing inside `arm` would surprise callers who hold a lock.
    pub fn arm(&mut self, delay: u64, payload: T) -> Result<TimerId, ArmError> {
        if delay > Self::LONGEST {
            return Err(ArmError::TooFar { delay, longest: Self::LONGEST });
        }
        let id = TimerId(self.next_id);
        self.next_id += 1;
        let deadline = self.now + delay.max(1);
        self.entries.insert(id, Entry { deadline, payload });
        self.place(id, deadline);
        Ok(id)
    }

    /// Returns the payload if the timer had not fired yet.
    pub fn cancel(&mut self, id: TimerId) -> Option<T> {
        self.entries.remove(&id).map(|entry| entry.payload)
    }

    fn place(&mut self, id: TimerId, deadline: u64) {
        // The level is given by the highest bit in which the deadline differs from the clock. All
        // higher bits agree, therefore the slot will be visited before the wheel turns over.
        let differing = (deadline ^ self.now).max(1);
        let level = ((63 - differing.leading_zeros()) / BITS).min(LEVELS as u32 - 1);
        let slot = (deadline >> (level * BITS)) as usize & (SLOTS - 1);
        self.slots[level as usize * SLOTS + slot].push(id);
    }

    /// Moves the clock by one tick and collects the payloads that are due, in the order of arming.
    pub fn tick(&mut self) -> Vec<T> {
        self.now += 1;
        // Cascade from the coarsest wheel whose slot has just begun down to the finest.
        for level in (1..LEVELS as u32).rev() {
            let below = (1u64 << (level * BITS)) - 1;
            if self.now & below == 0 {
                let slot = (self.now >> (level * BITS)) as usize & (SLOTS - 1);
                let ids = std::mem::take(&mut self.slots[level as usize * SLOTS + slot]);
                for id in ids {
                    if let Some(deadline) = self.entries.get(&id).map(|e| e.deadline) {
                        self.place(id, deadline);
                    }
                }
            }
        }
        let mut due = std::mem::take(&mut self.slots[self.now as usize & (SLOTS - 1)]);
        due.sort_unstable();
        due.into_iter()
            .filter_map(|id| self.entries.remove(&id))
            .map(|entry| {
                debug_assert_eq!(entry.deadline, self.now, "a timer was filed in the wrong slot");
                entry.payload
            })
            .collect()
    }
}

impl<T> Default for TimerWheel<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(wheel: &mut TimerWheel<&'static str>, ticks: u64) -> Vec<(u64, &'static str)> {
        let mut fired = Vec::new();
        for _ in 0..ticks {
            for name in wheel.tick() {
                fired.push((wheel.now, name));
            }
        }
        fired
    }

    #[test]
    fn fires_exactly_at_the_deadline_on_every_level() {
        for start in [0u64, 1, 63, 64, 4000, 4095] {
            for delay in [1u64, 2, 62, 63, 64, 65, 4095, 4096, 4097, 9000] {
                let mut wheel = TimerWheel::new();
                run(&mut wheel, start);
                wheel.arm(delay, "x").unwrap();
                let fired = run(&mut wheel, delay + 10);
                assert_eq!(fired, [(start + delay, "x")], "start {start}, delay {delay}");
            }
        }
    }

    #[test]
    fn simultaneous_timers_keep_their_order() {
        let mut wheel = TimerWheel::new();
        wheel.arm(500, "first").unwrap();
        run(&mut wheel, 490);
        wheel.arm(10, "second").unwrap();
        assert_eq!(run(&mut wheel, 10), [(500, "first"), (500, "second")]);
    }

    #[test]
    fn a_cancelled_timer_gives_its_payload_back_once() {
        let mut wheel = TimerWheel::new();
        let id = wheel.arm(70, "lease").unwrap();
        assert_eq!(wheel.cancel(id), Some("lease"));
        assert_eq!(wheel.cancel(id), None);
        assert!(run(&mut wheel, 200).is_empty());
        assert!(wheel.is_empty());
    }

    #[test]
    fn refuses_what_it_cannot_represent() {
        let mut wheel = TimerWheel::new();
        let delay = TimerWheel::<()>::LONGEST + 1;
        let error = wheel.arm(delay, ()).unwrap_err();
        assert_eq!(error, ArmError::TooFar { delay, longest: delay - 1 });
    }
}
