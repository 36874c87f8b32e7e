"""A running request that stands still whole: its blocks are parked, and it goes on as if nothing had been."""

from vllm_help import TOKENS, SchedulerOnPaper, asked, sequences

from psi_kv_governor.cache import Range, Verb
from psi_kv_governor.engines.vllm.messages import Kind
from psi_kv_governor.engines.vllm.wishes import Wish


class TestStandingStill:
    def setup_method(self):
        self.one = SchedulerOnPaper()
        for name in "abc":
            self.one.begin(name, 2 * TOKENS + 5)
        self.one.step()
        self.numbers = {it.request.request_id: it.number for it in self.one.side.requests}

    def wish(self, verb: Verb, name: str, *positions: tuple[int, int]) -> Wish:
        return Wish(verb, self.numbers[name], positions=positions or ((0, 1 << 40),))

    def test_its_blocks_go_after_the_last_step_that_writes_them(self):
        first = asked(self.one, self.wish(Verb.MASK, "c"))
        assert first == []
        assert self.one.held == {"c": True}
        (order,) = self.one.step().orders
        assert (order.kind, set(order.blocks)) == (Kind.PARK, set(self.one.tables["c"]))

    def test_the_first_one_of_all_always_goes_on(self):
        asked(self.one, *(self.wish(Verb.MASK, name) for name in "abc"))
        assert self.one.held == {"c": True, "b": True}
        assert [it.request.request_id for it in self.one.side.requests.moving] == ["a"]

    def test_the_lowest_of_vllms_own_order_goes_first(self):
        order = {it.id: it.preempt_order for it in sequences(self.one).values()}
        assert order == {self.numbers["a"]: None, self.numbers["b"]: 1, self.numbers["c"]: 0}

    def test_new_work_waits_while_somebody_stands_still(self):
        assert self.one.side.may_admit()
        asked(self.one, self.wish(Verb.MASK, "c"))
        assert not self.one.side.may_admit()

    def test_it_goes_on_when_the_last_of_its_blocks_is_back(self):
        asked(self.one, self.wish(Verb.MASK, "c"))
        self.one.until_idle()
        assert sequences(self.one)[self.numbers["c"]].masked == (Range(0, 2 * TOKENS + 5),)
        self.one.side._wishes.append(self.wish(Verb.UNMASK, "c", (0, TOKENS)))
        self.one.until_idle()
        assert sequences(self.one)[self.numbers["c"]].masked == (Range(TOKENS, 2 * TOKENS + 5),)
        assert self.one.held["c"]
        self.one.side._wishes.append(self.wish(Verb.UNMASK, "c"))
        self.one.until_idle()
        assert not self.one.held["c"]
        assert sequences(self.one)[self.numbers["c"]].running

    def test_who_is_alone_goes_on_at_once(self):
        asked(self.one, self.wish(Verb.MASK, "c"))
        self.one.until_idle()
        for name in "ab":
            self.one.end(name)
        step = self.one.step()
        assert not self.one.held["c"]
        assert set(self.one.tables["c"]) <= set(step.used)

    def test_a_request_that_vllm_preempts_meanwhile_is_free_again(self):
        asked(self.one, self.wish(Verb.MASK, "c"))
        self.one.until_idle()
        self.one.preempt("c")
        self.one.step()
        assert not self.one.held["c"]
        assert self.numbers["c"] not in sequences(self.one)

    def test_a_request_that_is_aborted_meanwhile_is_forgotten(self):
        asked(self.one, self.wish(Verb.MASK, "c"))
        self.one.until_idle()
        self.one.end("c")
        self.one.until_idle()
        assert not self.one.side.requests.still
        assert not self.one.side.pending()

    def test_blocks_that_others_use_too_stay(self):
        self.one.begin("d", 3 * TOKENS, shared=self.one.tables["a"][:2])
        self.one.step()
        self.numbers["d"] = max(self.numbers.values()) + 1
        asked(self.one, self.wish(Verb.MASK, "d"))
        (order,) = self.one.step().orders
        assert order.blocks == (self.one.tables["d"][2],)
