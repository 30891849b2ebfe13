//! A tree whose nodes live in one vector and refer to each other by index.
//!
//! Parents that own their children, and children that point back, are a knot of `Rc<RefCell<..>>`. With indices the borrow
//! checker sees a single owner, the nodes lie next to each other in memory, and an index survives a reallocation. What it
//! does not survive by itself is a removal: the slot may be taken by another node. So each index carries a generation.

use std::fmt;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Id {
    slot: u32,
    generation: u32,
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}v{}", self.slot, self.generation)
    }
}

struct Node<T> {
    value: T,
    parent: Option<Id>,
    children: Vec<Id>,
}

enum Slot<T> {
    Free { next: Option<u32>, generation: u32 },
    Used { node: Node<T>, generation: u32 },
}

pub struct Tree<T> {
    slots: Vec<Slot<T>>,
    free: Option<u32>,
    len: usize,
}

impl<T> Default for Tree<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: None, len: 0 }
    }
}

impl<T> Tree<T> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn get(&self, id: Id) -> Option<&T> {
        self.node(id).map(|n| &n.value)
    }

    /// Adds a node below `parent`, or a root. `None` if the parent has been removed.
    pub fn insert(&mut self, value: T, parent: Option<Id>) -> Option<Id> {
        if let Some(p) = parent {
            self.node(p)?;
        }
        let node = Node { value, parent, children: Vec::new() };
        let id = match self.free {
            Some(slot) => {
                let Slot::Free { next, generation } = self.slots[slot as usize] else {
                    unreachable!("the free list leads to free slots only")
                };
                self.free = next;
                self.slots[slot as usize] = Slot::Used { node, generation };
                Id { slot, generation }
            }
            None => {
                let slot = u32::try_from(self.slots.len()).expect("fewer than 2^32 nodes");
                self.slots.push(Slot::Used { node, generation: 0 });
                Id { slot, generation: 0 }
            }
        };
        if let Some(p) = parent {
            self.node_mut(p)?.children.push(id);
        }
        self.len += 1;
        Some(id)
    }

    /// Removes a node with all that hangs below it, and returns the values, children before their parents.
    pub fn remove(&mut self, id: Id) -> Vec<T> {
        let Some(node) = self.node(id) else { return Vec::new() };
        if let Some(p) = node.parent {
            if let Some(parent) = self.node_mut(p) {
                parent.children.retain(|&c| c != id);
            }
        }
        let mut order = vec![id];
        let mut next = 0;
        while next < order.len() {
            if let Some(n) = self.node(order[next]) {
                order.extend_from_slice(&n.children);
            }
            next += 1;
        }
        order.into_iter().rev().filter_map(|i| self.take(i)).collect()
    }

    fn take(&mut self, id: Id) -> Option<T> {
        self.node(id)?;
        let freed = Slot::Free { next: self.free, generation: id.generation.wrapping_add(1) };
        let Slot::Used { node, .. } = std::mem::replace(&mut self.slots[id.slot as usize], freed) else { return None };
        self.free = Some(id.slot);
        self.len -= 1;
        Some(node.value)
    }

    fn node(&self, id: Id) -> Option<&Node<T>> {
        match self.slots.get(id.slot as usize)? {
            Slot::Used { node, generation } if *generation == id.generation => Some(node),
            _ => None,
        }
    }

    fn node_mut(&mut self, id: Id) -> Option<&mut Node<T>> {
        match self.slots.get_mut(id.slot as usize)? {
            Slot::Used { node, generation } if *generation == id.generation => Some(node),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_id_does_not_find_the_new_tenant() {
        let mut tree = Tree::default();
        let root = tree.insert("root", None).unwrap();
        let leaf = tree.insert("leaf", Some(root)).unwrap();
        assert_eq!(tree.remove(leaf), ["leaf"]);
        let other = tree.insert("other", Some(root)).unwrap();
        assert_eq!(leaf.slot, other.slot);
        assert_eq!(tree.get(leaf), None);
        assert_eq!(tree.get(other), Some(&"other"));
    }

    #[test]
    fn a_subtree_goes_with_its_root_and_no_further() {
        let mut tree = Tree::default();
        let root = tree.insert(0, None).unwrap();
        let a = tree.insert(1, Some(root)).unwrap();
        tree.insert(2, Some(a)).unwrap();
        tree.insert(3, Some(root)).unwrap();
        assert_eq!(tree.remove(a), [2, 1]);
        assert_eq!(tree.len(), 2);
        assert!(tree.remove(a).is_empty());
    }
}
