/* Removal of redundant phi nodes.
   Part of the Wrenfield retargetable compiler, middle end.

   This file is free software; you may pass it on and change it under
   the terms given in the file COPYING at the top of the tree.  */

#include "config.h"
#include "system.h"
#include "bitset.h"
#include "flow.h"
#include "insn.h"
#include "ssa.h"
#include "dumpfile.h"

/* A phi is redundant when all of its arguments, ignoring the phi's own
   result, are the same name.  Loops make this less easy than it sounds:

	x_2 = PHI <x_1, x_3>
	x_3 = PHI <x_2, x_2>

   Neither phi is redundant taken alone the first time we look at x_2, but
   x_3 collapses to x_2, and then x_2 collapses to x_1.  We therefore keep
   a worklist and revisit the users of every result that we replace.  Sets
   of phis that are redundant only when considered together (the strongly
   connected kind) are left to value numbering.  */

/* Marks an argument set in which two different names were seen.  */
#define VARYING ((ssa_name *) 1)

/* Phis still to be looked at, by index into the phi table.  */
static bitset worklist;

/* Number of phis removed in the current function, for -fdump-stats.  */
static unsigned int n_pruned;

/* Return the only name that flows into PHI apart from its own result,
   NULL if there is none (the block can't be reached from the entry), or
   VARYING if there are several.  */

static ssa_name *
common_argument (const phi_node *phi)
{
  ssa_name *common = NULL;
  unsigned int i;

  for (i = 0; i < phi_num_args (phi); i++)
    {
      ssa_name *arg = phi_arg (phi, i);

      if (arg == phi_result (phi) || arg == common)
	continue;
      if (common)
	return VARYING;
      common = arg;
    }

  return common;
}

/* Return true if USE may stand wherever DEF stood.  Names that live across
   an abnormal edge must keep their base variable, because the edge can't
   be split and there is no place where a copy could go.  */

static bool
may_propagate_p (const ssa_name *def, const ssa_name *use)
{
  if (!name_on_abnormal_edge_p (def) && !name_on_abnormal_edge_p (use))
    return true;

  return name_base_var (def) == name_base_var (use);
}

/* Replace all uses of the result of PHI by VAL, queue the phis among the
   users, and delete PHI.  */

static void
collapse_phi (phi_node *phi, ssa_name *val)
{
  use_iterator it;
  use_operand *use;
  ssa_name *res = phi_result (phi);

  if (dump_file && (dump_flags & DUMP_DETAILS))
    {
      fprintf (dump_file, "  bb %d: ", phi_block (phi)->index);
      print_ssa_name (dump_file, res);
      fprintf (dump_file, " -> ");
      print_ssa_name (dump_file, val);
      fputc ('\n', dump_file);
    }

  FOR_EACH_USE_SAFE (use, it, res)
    {
      insn *user = use_insn (use);

      set_use (use, val);
      if (insn_is_phi (user))
	bitset_set (worklist, insn_phi (user)->index);
      else
	mark_insn_modified (user);
    }

  /* Debug information still talks about the user's variable.  If VAL has
     no name of its own, let it inherit this one.  */
  if (!name_base_var (val) && !name_on_abnormal_edge_p (res))
    set_name_base_var (val, name_base_var (res));

  bitset_clear (worklist, phi->index);
  remove_phi_node (phi, /*release_result=*/true);
  n_pruned++;
}

/* Entry point of the pass.  Return the TODO flags.  */

unsigned int
prune_redundant_phis (function *fn)
{
  basic_block bb;
  int index;

  n_pruned = 0;
  worklist = bitset_alloc (fn->last_phi_index + 1);

  FOR_EACH_BB (bb, fn)
    {
      phi_node *phi;

      for (phi = bb->phis; phi; phi = phi->next)
	bitset_set (worklist, phi->index);
    }

  while ((index = bitset_first (worklist)) >= 0)
    {
      phi_node *phi = fn->phi_table[index];
      ssa_name *val;

      bitset_clear (worklist, index);

      /* Removing one phi may have queued another twice; by the second
	 time it can be gone.  */
      if (!phi)
	continue;

      val = common_argument (phi);
      if (val == VARYING)
	continue;
      if (!val)
	val = undefined_name (fn, name_type (phi_result (phi)));
      if (may_propagate_p (phi_result (phi), val))
	collapse_phi (phi, val);
    }

  bitset_free (worklist);
  statistics_counter (fn, "phis pruned", n_pruned);

  return n_pruned ? TODO_update_uses : 0;
}
