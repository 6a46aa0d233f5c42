defmodule StarweaveImage.SidecarPromisesTest do
  # One process a test that breaks the protocol: it is killed, and its request done by the next. All that it may not say is in
  # answers_test.exs.
  use ExUnit.Case, async: true

  import ExUnit.CaptureLog
  import StarweaveImage.TestInstance

  import StarweaveImage.TestOSProcess,
    only: [await_gone: 2]

  alias StarweaveImage.Image

  describe "a process that" do
    test "answers twice is heard once, and killed" do
      instance = start_ready("answers_twice")
      victim = os_pid(instance)
      {:ok, id} = StarweaveImage.submit("a fig", seed: 2, instance: instance)

      assert {:ok, %Image{data: "a fig, seed 2"}} =
               StarweaveImage.await(id, 10_000, instance: instance)

      assert [] == await_gone([victim], 5_000)
      assert {:ok, [%Image{}]} = StarweaveImage.await_many(id, 10_000, instance: instance)
      assert StarweaveImage.status(instance: instance).queue.running == 0
      assert mailbox() == []
    end

    for broken <- [
          "progress before accepted",
          "accepts other seeds",
          "part with a gap",
          "empty part",
          "large part",
          "checksum in capitals",
          "bytes without sense",
          "a list",
          "a message and one byte",
          "a message of no type",
          "an id that is a number",
          "a frame of four gigabytes",
          "a frame over the limit",
          "a frame of no bytes"
        ] do
      test "breaks a promise (#{broken}) is killed, and its request done by the next" do
        instance = start_ready("breaks_promises")
        victim = os_pid(instance)

        log =
          capture_log(fn ->
            assert {:ok, %Image{data: unquote(broken <> ", seed 41"), attempts: 2}} =
                     StarweaveImage.generate(unquote(broken), seed: 41, instance: instance)
          end)

        assert log =~ "(generation 1) is killed: it sent" or log =~ "is killed: it accepted"
        assert [] == await_gone([victim], 5_000)
        assert_works(instance)
      end
    end

    test "goes on about a request after its end is killed" do
      instance = start_ready("breaks_promises")
      victim = os_pid(instance)

      assert {:ok, %Image{attempts: 1}} =
               StarweaveImage.generate("done again", instance: instance)

      assert [] == await_gone([victim], 5_000)
      assert {:ok, %Image{}} = StarweaveImage.generate("an apple", seed: 5, instance: instance)
      assert sidecar(instance).generation == 2
    end

    test "refuses a message with the id of a request that goes on has not ended it" do
      instance = start_ready("refuses_without_an_end")
      pid = os_pid(instance)
      assert_works(instance)
      assert_works(instance)
      assert os_pid(instance) == pid
    end

    test "answers for ids and generations that are none is not heard" do
      instance = start_ready("answers_for_nobody")
      pid = os_pid(instance)
      assert_works(instance)
      assert {:error, :not_found} = StarweaveImage.subscribe("nobody", instance: instance)
      assert_works(instance)
      assert os_pid(instance) == pid
    end

    test "sends an image with a wrong checksum is killed" do
      assert 2 == assert_replayed("wrong_checksum")
    end

    test "is of another version of the protocol is killed" do
      instance = start("wrong_version")
      assert await_state(instance, :down).error == "it speaks version 2 of the protocol"
    end
  end
end
