// Backward of one call: statistics of every query, then the tasks of the plan, then what only all
// of them together can finish.
#include <algorithm>
#include <cstddef>

#include "attention/backward_plan.h"
#include "attention/call.h"
#include "attention/packed_queries.h"
#include "attention/statistics.h"
#include "attention/tasks.h"
#include "threads/pool.h"

namespace fusedattn {
namespace {

class Backward {
 public:
  Backward(Call& c, Loop& loop) : call_(c), loop_(loop), plan_(c), statistics_(c), covers_(c) {}

  bool run() {  // false if interrupted
    const double claim = plan_.by_head ? CLAIM : CLAIM_IN_TURN;
    return make_statistics() &&
           run_tasks(plan_.tasks.total(), plan_.flops, claim, plan_.threads, loop_,
                     [&](index_t task, index_t then) {
                       if (plan_.by_head)
                         run_head(task, then);
                       else
                         run_block(task, then);
                     }) &&
           finish();
  }

 private:
  using Place = BackwardPlan::Place;

  // A task with a head of its own makes its statistics itself: dout and dq are in the caches then.
  bool make_statistics() {
    return plan_.by_head || over_queries(call_, plan_.threads, loop_,
                                         [&](index_t b, index_t h, index_t begin, index_t end) {
                                           compute_statistics(b, h, begin, end);
                                         });
  }
  void compute_statistics(index_t b, index_t h, index_t begin, index_t end) {
    statistics_.compute(call_, plan_.kernels, b, h, begin, end, call_.dout.at(b, h),
                        statistics_.dq.at(b, h));
  }

  // What the kernel is told of a task's head, but for its turns and what comes next.
  BackwardHead head_at(const Place& at) {
    const Call& c = call_;
    const index_t stat =
        (c.lse_batch[std::size_t(at.b)] + at.h * c.lse_head) * compute_size(c.dtype);
    BackwardHead head{};
    head.k = c.k.at(at.b, at.kv);
    head.v = c.v.at(at.b, at.kv);
    head.dk = c.dk.at(at.b, at.kv);
    head.dv = c.dv.at(at.b, at.kv);
    head.q = c.q.at(at.b, at.h);
    head.dout = c.dout.at(at.b, at.h);
    head.dq = statistics_.dq.at(at.b, at.h);
    head.dbias = c.dbias.at(at.b, at.h);
    head.q_head = c.q.head;
    head.dout_head = c.dout.head;
    head.dq_head = statistics_.dq.head;
    head.dbias_head = c.dbias.head;
    head.mask_head = c.mask.head;
    head.covers_head = covers_.step(at.b);
    head.bias_head = c.bias.head;
    head.lse2 = statistics_.lse2 + stat;
    head.delta = statistics_.delta + stat;
    head.stat_head = c.lse_head;
    head.group = plan_.group;
    head.sq = c.sq[std::size_t(at.b)];
    head.sk = c.sk[std::size_t(at.b)];
    head.d = c.d;
    head.d_v = c.d_v;
    head.scale = c.scale;
    head.k_scale = key_scale(c);
    head.rules = c.rules(at.b, at.h);
    head.rules.covers = covers_.at(at.b, at.h);
    if (!c.alibi_slopes.empty())
      head.alibi_slopes = &c.alibi_slopes[std::size_t(at.b * c.heads + at.h)];
    head.visible = plan_.visible_at(at.b);
    head.wait_for_turn = wait_for_turn;
    head.call = &loop_;
    return head;
  }

  // Keys that a thread takes next; of a new head it reads out and writes dq as well.
  NextKeys keys_at(const Place& at, bool new_head) const {
    const Call& c = call_;
    const index_t begin = at.block * plan_.kernels.back_keys;
    NextKeys next{};
    next.k = c.k.at(at.b, at.kv);
    next.v = c.v.at(at.b, at.kv);
    next.q = c.q.at(at.b, at.h);
    next.dout = c.dout.at(at.b, at.h);
    if (new_head) {
      next.out = c.out.at(at.b, at.h);
      next.dq = statistics_.dq.at(at.b, at.h);
    }
    next.mask = c.mask.at(at.b, at.h);
    next.bias = c.bias.at(at.b, at.h);
    next.begin = begin;
    next.end = std::min(begin + plan_.kernels.back_keys, c.sk[std::size_t(at.b)]);
    next.sq = c.sq[std::size_t(at.b)];
    return next;
  }
  NextKeys keys_of(index_t task) const {
    return task < 0 ? NextKeys{} : keys_at(plan_.place(task), plan_.by_head);
  }

  // Scratch of the kernel, and `extra` bytes behind it.
  struct Memory {
    char *scratch, *extra;
  };
  Memory memory_for(const BackwardHead& head, index_t extra) const {
    const index_t needed = ceil_div(index_t(plan_.kernels.backward_scratch(head)), 64) * 64;
    char* scratch = static_cast<char*>(thread_scratch(std::size_t(needed + extra)));
    return {scratch, scratch + needed};
  }

  // A block of keys of a head that other tasks work on too.
  void run_block(index_t task, index_t then) {
    const Place at = plan_.place(task);
    BackwardHead head = head_at(at);
    head.dq_turns = plan_.turns_of_dq(at);
    head.bias_turns = plan_.turns_of_bias(task, at);
    head.next = keys_of(then);
    plan_.kernels.backward(head, at.block, memory_for(head, 0).scratch);
  }

  // All blocks of keys of a head that nobody else adds to, in order.
  void run_head(index_t task, index_t then) {
    const Call& c = call_;
    Place at = plan_.place(task);
    BackwardHead head = head_at(at);
    const index_t blocks = plan_.key_blocks(at.b);
    PackedQueries packed(c, head.sq, blocks > 1 && !statistics_.dq_data);
    const Memory memory = memory_for(head, plan_.group * packed.bytes());
    packed.lay_out(memory.extra, plan_.group);
    for (index_t g = 0; g < plan_.group; g++) {
      if (packed.used) {
        const auto [dout, dq] = packed.copy(c, at.b, at.h + g, g);
        statistics_.compute(c, plan_.kernels, at.b, at.h + g, 0, head.sq, dout, dq);
      } else {
        compute_statistics(at.b, at.h + g, 0, head.sq);
      }
    }
    if (packed.used) packed.give_to(c, head);
    for (; at.block < blocks && !is_cancelled(loop_); at.block++) {
      head.next = next_of_head(head, at, blocks, then);
      plan_.kernels.backward(head, at.block, memory.scratch);
    }
    for (index_t g = 0; g < plan_.group && packed.used && c.dq.data; g++)
      plan_.kernels.round(packed.dq + g * packed.dq_bytes, 1, c.dq.at(at.b, at.h + g), 0, head.sq,
                          c.d);
  }
  NextKeys next_of_head(const BackwardHead& head, Place at, index_t blocks, index_t then) const {
    if (++at.block == blocks) return keys_of(then);
    NextKeys next = keys_at(at, false);
    next.q = head.q;  // copied, maybe
    next.dout = head.dout;
    return next;
  }

  // Sums over samples, and dq from sums of its own.
  bool finish() {
    Call& c = call_;
    for (std::size_t h = 0; h < c.dsinks.size(); h++)
      c.dsinks[h] = statistics_.sink_gradient(c, index_t(h));
    if (!statistics_.dq_data) return true;
    const double rest = c.scale == 0 ? 1 : c.scale / key_scale(c);
    return over_queries(
        c, plan_.threads, loop_, [&](index_t b, index_t h, index_t begin, index_t end) {
          plan_.kernels.round(statistics_.dq.at(b, h).data, rest, c.dq.at(b, h), begin, end, c.d);
        });
  }

  Call& call_;
  Loop& loop_;
  BackwardPlan plan_;
  Statistics statistics_;
  MaskCovers covers_;
};

}  // namespace

bool attention_backward(Call& call, Loop& loop) {
  return Backward(call, loop).run();
}

}  // namespace fusedattn
