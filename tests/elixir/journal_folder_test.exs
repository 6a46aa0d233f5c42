defmodule StarweaveImage.JournalFolderTest do
  # What others do to the folder of a journal: before it is used, and while it is.
  use ExUnit.Case, async: true

  import Bitwise
  import ExUnit.CaptureLog
  import StarweaveImage.TestInstance
  import StarweaveImage.TestJournal, only: [images: 1, job: 1]
  import StarweaveImage.TestOSProcess, only: [await: 1]

  alias StarweaveImage.{Error, Image, Journal}

  @moduletag :tmp_dir
  @moduletag timeout: 120_000

  setup %{tmp_dir: tmp_dir}, do: {:ok, folder: Path.join(tmp_dir, "a/journal")}

  defp open(folder) do
    {:ok, journal} = Journal.start_link(folder: folder, instance: folder)
    journal
  end

  defp accept(journal, id, answer \\ :ok) do
    Journal.accept(journal, id, job(id))
    assert_receive {:journal, {:accept, ^id}, ^answer}, 10_000
  end

  defp kill(journal) do
    Process.unlink(journal)
    monitor = Process.monitor(journal)
    Process.exit(journal, :kill)
    assert_receive {:DOWN, ^monitor, _, _, _}, 10_000
  end

  defp unfinished(journal), do: for(%{id: id} <- Journal.recover(journal).unfinished, do: id)

  # One that was begun, one that has ended, one that waits.
  defp used(folder) do
    journal = open(folder)
    assert %{unfinished: []} = Journal.recover(journal)
    for id <- ~w(a b c), do: accept(journal, id)
    Journal.attempt(journal, "a", 2)
    Journal.finish(journal, "b", {:ok, images("b")})
    assert_receive {:journal, {:finish, "b"}, :ok}, 10_000
    journal
  end

  # What was logged of this folder; other tests log too.
  defp logged(folder, fun) do
    log = capture_log(fun)
    log |> String.split("\n") |> Enum.filter(&String.contains?(&1, folder)) |> Enum.join("\n")
  end

  defp mode(path), do: File.stat!(path).mode &&& 0o7777

  defp entries(folder),
    do: Path.wildcard(Path.join(folder, "**"), match_dot: true)

  describe "under a journal that runs" do
    for {name, ruin} <- [
          {"the folder is removed", quote(do: &File.rm_rf!/1)},
          {"the folder above is removed", quote(do: &File.rm_rf!(Path.dirname(&1)))},
          {"the log is removed", quote(do: &File.rm!(Path.join(&1, "journal")))},
          {"the folder is moved", quote(do: &File.rename!(&1, &1 <> "-moved"))},
          {"an empty folder takes its place",
           quote(do: &(File.rename!(&1, &1 <> "-moved") && File.mkdir!(&1)))}
        ] do
      test "#{name}: it is made anew, and has all that was acknowledged", %{folder: folder} do
        journal = used(folder)

        log =
          logged(folder, fn ->
            unquote(ruin).(folder)
            accept(journal, "d")
          end)

        assert log =~ "somebody has removed the journal in #{folder}: it is written there anew"
        refute log =~ "cannot be used"
        assert mode(folder) == 0o700
        assert mode(Path.join(folder, "journal")) == 0o600
        kill(journal)

        capture_log(fn ->
          journal = open(folder)
          assert Enum.sort(unfinished(journal) -- ["b"]) == ~w(a c d)
          assert %{unfinished: unfinished} = Journal.recover(journal)
          assert %{attempts: 2} = Enum.find(unfinished, &(&1.id == "a"))
          for %{id: id, job: job} <- unfinished, do: assert(job == job(id))
        end)
      end
    end

    test "the lock is removed: it is taken anew", %{folder: folder} do
      journal = used(folder)
      [lock] = Path.wildcard(Path.join(folder, "*.lock"))
      File.rm!(lock)
      accept(journal, "d")
      assert [_another] = Path.wildcard(Path.join(folder, "*.lock"))
      assert Journal.recover(open(folder)) == {:error, "another instance uses its folder"}
    end

    test "what stands in its way makes it refuse, until that is gone", %{folder: folder} do
      journal = used(folder)

      log =
        logged(folder, fn ->
          File.rm_rf!(folder)
          File.write!(folder, "a file")
          accept(journal, "d", {:error, "not a directory"})
          assert_receive {:journal, :health, "not a directory"}, 10_000
          accept(journal, "e", {:error, "not a directory"})
          assert {:error, "not a directory"} = Journal.result(journal, "b")
          File.rm!(folder)
          # By itself.
          assert_receive {:journal, :health, nil}, 10_000
        end)

      assert [_, _] = String.split(log, "#{folder} cannot be used: not a directory")
      assert log =~ "#{folder} can be used now"
      accept(journal, "f")
      kill(journal)
      capture_log(fn -> assert unfinished(open(folder)) -- ["b"] == ~w(a c f) end)
    end

    test "an end that could not be written is written when it can be", %{folder: folder} do
      journal = used(folder)
      blobs = Path.join(folder, "blobs")
      File.rename!(blobs, blobs <> "-moved")
      File.write!(blobs, "a file")
      Journal.finish(journal, "a", {:ok, images("a")})
      assert_receive {:journal, {:finish, "a"}, {:error, "not a directory"}}, 10_000
      # That of one that is forgotten meanwhile is not that of the next one of its id.
      Journal.finish(journal, "c", {:ok, images("c")})
      assert_receive {:journal, {:finish, "c"}, {:error, "not a directory"}}, 10_000
      Journal.forget(journal, "c")
      accept(journal, "c")
      File.rm!(blobs)
      File.rename!(blobs <> "-moved", blobs)
      assert await(fn -> unfinished(journal) == ["c"] end)
      assert Journal.result(journal, "a") == {:ok, {:ok, images("a")}}
      kill(journal)
      journal = open(folder)
      assert %{unfinished: [%{id: "c"}], finished: finished} = Journal.recover(journal)
      assert Enum.map(finished, & &1.id) -- ["b"] == ["a"]
    end

    test "another journal in its place is left as it is", %{folder: folder} do
      journal = used(folder)
      File.rename!(folder, folder <> "-moved")
      other = used(folder)
      accept(other, "other")
      before = File.read!(Path.join(folder, "journal"))

      capture_log(fn ->
        Journal.accept(journal, "d", job("d"))
        assert_receive {:journal, {:accept, "d"}, {:error, sentence}}, 10_000
        assert sentence == "another instance uses its folder"
        kill(other)
        Journal.accept(journal, "e", job("e"))
        assert_receive {:journal, {:accept, "e"}, {:error, sentence}}, 10_000
        assert sentence =~ "another journal is in the place of its own"
        assert File.read!(Path.join(folder, "journal")) == before

        File.rename!(folder, folder <> "-other")
        accept(journal, "f")
        kill(journal)
        assert unfinished(open(folder)) -- ["b"] == ~w(a c f)
      end)
    end

    test "what was cut off is not written over with nothing before it", %{folder: folder} do
      journal = used(folder)
      path = Path.join(folder, "journal")
      first = binary_part(File.read!(path), 0, 20)

      capture_log(fn ->
        File.write!(path, first)
        accept(journal, "d")
        assert unfinished(journal) == ["d"]
        kill(journal)
        assert %{unfinished: [%{id: "d"}], damaged: 0} = Journal.recover(open(folder))
      end)
    end
  end

  describe "a folder that others can look into" do
    test "is closed, with all that is in it, and the log says so", %{folder: folder} do
      kill(used(folder))

      for path <- entries(folder),
          do: File.chmod!(path, if(File.dir?(path), do: 0o755, else: 0o644))

      File.chmod!(folder, 0o755)
      log = logged(folder, fn -> assert unfinished(open(folder)) == ~w(a c) end)

      assert log =~
               "others could look into #{folder}; the journal there is for its owner alone now"

      for path <- [folder | entries(folder)], File.lstat!(path).type != :other do
        assert {path, mode(path) &&& 0o077} == {path, 0}
      end
    end

    test "is closed where it is empty", %{folder: folder} do
      File.mkdir_p!(folder)
      File.chmod!(folder, 0o777)
      capture_log(fn -> assert unfinished(open(folder)) == [] end)
      assert mode(folder) == 0o700
    end

    test "is refused where it holds other things, and left as it is", %{folder: folder} do
      File.mkdir_p!(folder)
      File.chmod!(folder, 0o755)
      File.write!(Path.join(folder, "index.html"), "for all")

      capture_log(fn ->
        journal = open(folder)
        assert {:error, sentence} = Journal.recover(journal)
        assert sentence =~ "others can look into its folder, which holds more than a journal"
        assert {mode(folder), File.ls!(folder)} == {0o755, ["index.html"]}
        File.chmod!(folder, 0o700)
        assert unfinished(journal) == []
      end)
    end

    test "has nothing for others in a folder that was never open either", %{folder: folder} do
      kill(used(folder))

      for path <- entries(folder), File.lstat!(path).type == :regular do
        assert {path, mode(path)} == {path, 0o600}
      end
    end
  end

  test "an image file that is no file is no result, and keeps nobody waiting", %{folder: folder} do
    kill(used(folder))
    [blob | _] = Enum.filter(entries(Path.join(folder, "blobs")), &File.regular?/1)
    File.rm!(blob)
    {_, 0} = System.cmd("mkfifo", [blob])
    capture_log(fn -> assert unfinished(open(folder)) == ~w(a b c) end)
  end

  test "an instance says that it cannot keep its promise, and keeps it again", %{folder: folder} do
    instance = start_ready("honest", journal: folder)
    submit = fn id -> StarweaveImage.submit("hold", instance: instance, durable: true, id: id) end
    assert {:ok, "a"} = submit.("a")
    await_running(instance, "a")
    assert StarweaveImage.status(instance: instance).journal == %{usable?: true, error: nil}

    capture_log(fn ->
      File.rm_rf!(folder)
      assert {:ok, "b"} = submit.("b")
      # The attempt of one that begins may make the folder anew in between.
      assert await(fn -> File.rm_rf!(folder) != [] && File.write(folder, "a file") == :ok end)
      assert {:error, %Error{kind: :unavailable, retryable?: true} = error} = submit.("c")
      assert error.message =~ "cannot be kept on disk: not a directory"

      assert StarweaveImage.status(instance: instance).journal ==
               %{usable?: false, error: "not a directory"}

      # Others are drawn.
      assert {:ok, %Image{}} = StarweaveImage.generate("a fig", instance: instance)
      File.rm!(folder)
      assert await(fn -> StarweaveImage.status(instance: instance).journal.usable? end)
      assert {:ok, "d"} = submit.("d")

      :ok = stop_supervised(instance)
      instance = start("honest", journal: folder)
      assert :ok = StarweaveImage.await_ready(20_000, instance: instance)
      for id <- ~w(a b d), do: await_running(instance, id)
      assert {:error, :not_found} = StarweaveImage.cancel("c", instance: instance)
      for id <- ~w(a b d), do: assert(:ok = StarweaveImage.cancel(id, instance: instance))
    end)

    instance = start_ready("honest")
    assert StarweaveImage.status(instance: instance).journal == nil
  end
end
