#include "model_file.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>

#include "error.hpp"

namespace ddpmx {
namespace {

constexpr int kMaxLinks = 40;  // as Linux has it

Failure unreadable(const std::string &path, const std::string &note, const std::string &hint = "") {
  return Failure(DDPMX_FILE_FORMAT, path + ": cannot be read", note, hint);
}

// An open file, closed at the end.
class File {
 public:
  explicit File(const std::string &path) : path_(path) {
    struct stat info;
    if (stat(path.c_str(), &info) != 0) throw failed();
    // before it is opened: opening a pipe blocks until there is a writer, and opening a device may do anything
    if (!S_ISREG(info.st_mode)) throw unreadable(path, S_ISDIR(info.st_mode) ? reason(EISDIR) : "not a file");
    descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (descriptor_ < 0) throw failed();
    if (fstat(descriptor_, &info) != 0 || !S_ISREG(info.st_mode)) {  // replaced meanwhile
      close(descriptor_);
      throw unreadable(path, "not a file");
    }
    size_ = static_cast<size_t>(info.st_size);
  }
  ~File() { close(descriptor_); }
  File(const File &) = delete;
  File &operator=(const File &) = delete;

  int descriptor() const { return descriptor_; }
  size_t size() const { return size_; }
  Failure failed() const {
    return unreadable(path_, reason(errno),
                      errno == ENOENT ? "`ddpmx export RUN -o model.onnx` writes a model file from a checkpoint" : "");
  }

 private:
  const std::string &path_;
  int descriptor_ = -1;
  size_t size_ = 0;
};

bool is_folder(const std::string &path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

[[noreturn]] void refuse_folder(const std::string &path) {
  int error = 0;
  if (is_file(path + "/spec.json", error) || is_folder(path + "/checkpoints")) {
    throw Failure(DDPMX_FILE_FORMAT, path + ": a ddpmx checkpoint, not a model file", "",
                  "`ddpmx export RUN -o model.onnx` writes a model file from a checkpoint");
  }
  throw Failure(DDPMX_FILE_FORMAT, path + ": a folder, but not a ddpmx checkpoint",
                "there is no spec.json and no checkpoints folder in it");
}

bool ends_with(const std::string &text, const std::string &end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

std::string reason(int error) { return std::generic_category().message(error); }

bool is_file(const std::string &path, int &error) {
  struct stat info;
  error = stat(path.c_str(), &info) == 0 ? 0 : errno;
  if (error != 0) {
    if (error == ENOENT || error == ENOTDIR || error == EBADF || error == ELOOP) error = 0;
    return false;
  }
  return S_ISREG(info.st_mode);
}

std::string resolved(const std::string &path, int &error) {
  error = 0;
  std::string done, rest = path;
  if (path.empty() || path[0] != '/') {
    char *here = getcwd(nullptr, 0);
    if (here != nullptr) done = here;
    std::free(here);
  }
  for (int links = 0; !rest.empty();) {
    const size_t slash = rest.find('/');
    const std::string part = rest.substr(0, slash);
    rest = slash == rest.npos ? "" : rest.substr(slash + 1);
    if (part.empty() || part == ".") continue;
    if (part == "..") {
      done.erase(std::min(done.rfind('/'), done.size()));
      continue;
    }
    const std::string next = done == "/" ? "/" + part : done + "/" + part;
    char target[4096];  // PATH_MAX
    const ssize_t size = readlink(next.c_str(), target, sizeof target);
    if (size < 0) {
      done = next;
      continue;
    }
    if (++links > kMaxLinks) {
      error = ELOOP;
      return next;
    }
    if (size > 0 && target[0] == '/') done.clear();
    rest = std::string(target, static_cast<size_t>(size)) + "/" + rest;
  }
  return done.empty() ? "/" : done;
}

MappedFile::MappedFile(const std::string &path) {
  const File file(path);
  if (file.size() == 0) return;  // an empty file cannot be mapped, and need not be
  void *data = mmap(nullptr, file.size(), PROT_READ, MAP_PRIVATE, file.descriptor(), 0);
  if (data == MAP_FAILED) throw file.failed();
  data_ = data;
  size_ = file.size();
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(data_, size_);
}

Kind identify(const std::string &path) {
  if (is_folder(path)) refuse_folder(path);
  char bytes[4];
  std::string_view head;
  {
    const File file(path);
    const ssize_t size = read(file.descriptor(), bytes, sizeof bytes);
    if (size < 0) throw file.failed();
    head = {bytes, static_cast<size_t>(size)};
  }
  if (head.empty()) throw Failure(DDPMX_FILE_FORMAT, path + ": the file is empty");
  if (head == "ftrt" || head == "vtrt") return Kind::plan;
  if (ends_with(path, ".mnn")) {
    throw Failure(DDPMX_FILE_FORMAT, path + ": an MNN model, which libddpmx does not run", "",
                  "the ONNX file that it was made from");
  }
  // A ModelProto begins with ir_version (field 1, a number): every writer puts the lowest field first.
  if (head[0] == 0x08) return Kind::onnx;
  if (ends_with(path, ".parity.npz")) {
    throw Failure(DDPMX_FILE_FORMAT, path + ": a parity record, not a model file", "",
                  "ddpmx parity model.onnx --against " + shell_word(path));
  }
  if (head.substr(0, 4) == std::string("PK\x03\x04") || head.substr(0, 1) == "\x80" || ends_with(path, ".safetensors")) {
    throw Failure(DDPMX_FILE_FORMAT, path + ": weights or an archive, neither an ONNX file nor a TensorRT plan",
                  "it begins with " + in_quotes(head),
                  "ddpmx import " + shell_word(path) + " -o runs/NAME, then ddpmx export runs/NAME, where torch is");
  }
  throw Failure(DDPMX_FILE_FORMAT, path + ": neither an ONNX file nor a TensorRT plan",
                "it begins with " + in_quotes(head), "`ddpmx export` writes model.onnx from a checkpoint");
}

}  // namespace ddpmx
